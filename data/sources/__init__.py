"""What networks train on: `load_source(name)` gives any data set, embedded or on the user's disk."""

from collections.abc import Callable

from data.sources import images, text, wordpiece
from data.sources.base import Batch, Source, Split
from predictor.errors import unknown

__all__ = ["SOURCES", "Batch", "Source", "Split", "load_source"]

SOURCES: dict[str, Callable[[], Source]] = {
    "digits": images.digits,
    "fashion": images.fashion,
    "glosses": text.glosses,
    "fashion-first": images.fashion_first,
    "fashion-last": images.fashion_last,
    "fashion-full": images.fashion_full,
    "mnist-5k": images.mnist_5k,
    "glosses-full": text.glosses_full,
    "foods": text.foods,
    "glosses@minilm": wordpiece.glosses_minilm,
    "foods@minilm": wordpiece.foods_minilm,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
}
"""Every source by name, besides `imagefolder:PATH`."""


def load_source(name: str, *, train_samples: int | None = None) -> Source:
    """A data set by its name in SOURCES, or `imagefolder:PATH`.

    What is not embedded is looked for below $SMARTFRZ_DATA (by default ~/.cache/smartfrz) and where Debian's and
    PyPI's packages put it: `python -m data prepare` lists what is there and how to get the rest.

    train_samples: use so many training samples only, each class with its share, always the same ones.

    Raises UsageError for an unknown name or too many samples, FileFault for data that is missing or broken.
    """
    source = _load(name)
    return source if train_samples is None else source.limited(train_samples)


def _load(name: str) -> Source:
    if name.startswith("imagefolder:"):
        from data.sources.folder import image_folder  # torchvision: half a second that the others need not wait for

        return image_folder(name.removeprefix("imagefolder:"))
    if name not in SOURCES:
        raise unknown("source", name, SOURCES, "imagefolder:PATH")
    return SOURCES[name]()

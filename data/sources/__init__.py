"""What networks train on: `load_source(name)` gives any data set, embedded or on the user's disk."""

from collections.abc import Callable

from data.sources import images, text, wordpiece
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
    "foods": text.foods,
    "glosses@minilm": wordpiece.glosses_minilm,
    "foods@minilm": wordpiece.foods_minilm,
    "cifar10": images.cifar10,
    "cifar100": images.cifar100,
}
"""Every source by name, besides halves of them (`NAME-first`, `NAME-last`) and `imagefolder:PATH`."""


def load_source(name: str, *, train_samples: int | None = None) -> Source:
    """A data set by its name in SOURCES, half of its classes as `NAME-first` or `NAME-last`, or `imagefolder:PATH`.

    The first half is to pretrain on, the last to fine-tune on: of Fashion-MNIST, say, clothes, then mostly shoes.

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
    if name in SOURCES:
        return SOURCES[name]()
    whole, _, half = name.rpartition("-")
    if whole in SOURCES and half in ("first", "last"):
        return _half(SOURCES[whole](), name, half == "last")
    raise unknown("source", name, SOURCES, "halves of them as NAME-first and NAME-last, imagefolder:PATH")


def _half(source: MemorySource, name: str, last: bool) -> MemorySource:
    """The first or the last half of a source's classes; of an odd number the last half has one more."""
    middle = source.classes // 2
    if middle < 2:
        raise UsageError(f"{name}: half of the {source.classes} classes of {source.name} leave nothing to tell apart")
    return source.of_classes(name, range(middle, source.classes) if last else range(middle))

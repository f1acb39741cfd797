"""A folder of the user's own images, one subfolder a class, read from the disk by the workers of a DataLoader."""

import copy
import math
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional

from data.sources.base import Batch, Plan, Source, Split, generator_for, on_device, stratified
from data.sources.memory import Look
from predictor.errors import FileFault, UsageError

Listing: TypeAlias = list[tuple[str, int]]
"""(path, label) of each image of a split."""

# ImageNet's, as the pretrained networks of torchvision and timm expect.
_LOOK = Look(mean=(123.7, 116.3, 103.5), deviation=(58.4, 57.1, 57.4), flip=True)
_MARGIN = 256 / 224  # the shorter side before the crop, relative to the size
_AREA, _RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of a random crop
_MOST_WORKERS, _MOST_WORKERS_GPU = 8, 32


def image_folder(argument: str) -> "FolderSource":
    """PATH/train and PATH/test (or PATH/val), with a subfolder of images a class. `PATH@SIZE` sets the size (224)."""
    found = re.fullmatch(r"(.+?)(?:@([1-9]\d*))?", argument)
    if not found:
        raise UsageError("imagefolder: without a folder: write imagefolder:PATH or imagefolder:PATH@SIZE")
    root, size = Path(found[1]).expanduser(), int(found[2] or 224)
    train_folder = _existing(root, ("train",))
    test_folder = _existing(root, ("test", "val"))
    train, train_classes = _listed(train_folder)
    test, test_classes = _listed(test_folder)
    if train_classes != test_classes:
        odd = ", ".join(sorted(set(train_classes) ^ set(test_classes)))
        raise FileFault(f"{root}: train and {test_folder.name} differ in their classes ({odd}): give both the same")
    return FolderSource(f"imagefolder:{argument}", len(train_classes), train, test, size)


class FolderSource(Source):
    """Images read from the disk for each batch, cropped to a square and normalized as for ImageNet.

    Augmentation crops a random part of 35 to 100 % of the area and mirrors half of the images. Its random numbers
    depend on (seed, epoch, id), and not on the number of workers.

    For a GPU, JPEG files are decoded at a half, a quarter or an eighth of their size, where that leaves at least the
    pixels that are wanted. That is several times as fast, and pixels are not quite those of a CPU's training.
    """

    kind = "image"
    augmentable = True

    def __init__(self, name: str, classes: int, train: Listing, test: Listing, size: int) -> None:
        self.name, self.classes = name, classes
        self.shape = (3, size, size)
        self._listing: dict[Split, Listing] = {"train": train, "test": test}
        self._labels = {split: torch.tensor([label for _, label in rows]) for split, rows in self._listing.items()}
        self._loaders = _Loaders()

    def labels(self, split: Split) -> Tensor:
        """labels_N of a split, int64, on the CPU, in the order of the ids."""
        return self._labels[split]

    def limited(self, train_samples: int) -> "FolderSource":
        """The source with `train_samples` training images, each class in proportion. Their ids start from 0 again."""
        twin = copy.copy(self)
        chosen = stratified(self.labels("train"), train_samples)
        train = [self._listing["train"][index] for index in chosen.tolist()]
        twin._listing = {"train": train, "test": self._listing["test"]}
        twin._labels = {"train": self.labels("train")[chosen], "test": self.labels("test")}
        twin._loaders = _Loaders()
        return twin

    def _load(self, split: Split, plan: Plan, device: torch.device) -> Iterator[Batch]:
        on_gpu = device.type != "cpu"
        seeds = (plan.seed, plan.epoch) if plan.augment else None
        orders = [[_Order(index, seeds, on_gpu) for index in ids_B.tolist()] for ids_B in plan.ids]
        images = _Images([path for path, _ in self._listing[split]], self.shape[1])
        with self._loaders.taken(split, images, on_gpu, pinned=device.type == "cuda") as loader:
            for ids_B, read in zip(plan.ids, loader.read(orders), strict=True):
                if isinstance(read, FileFault):
                    raise read
                x_BCHW = _LOOK.normalized(read.to(device, non_blocking=True))
                yield ids_B, x_BCHW, on_device(self._labels[split][ids_B], device)


class _Order(NamedTuple):
    """One image to read."""

    sample: int
    seeds: tuple[int, int] | None
    """The training's seed and the epoch, for augmentation; None for the middle of the image."""
    fast: bool
    """Whether it may be decoded at a lower resolution."""


class _Images(Dataset[Any]):
    """Reads one image_CHW as uint8, or returns the fault, which a worker would raise with a page of traceback."""

    def __init__(self, paths: list[str], size: int) -> None:
        self._paths, self._size = paths, size

    def __getitem__(self, order: _Order) -> Tensor | FileFault:
        path = self._paths[order.sample]
        try:
            with Image.open(path) as file:
                whole = file.size
                part = _random_part(*whole, generator_for(*order.seeds, order.sample)) if order.seeds else None
                if order.fast:
                    file.draft("RGB", _pixels_wanted(whole, part, self._size))
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL's for broken files
            return FileFault(f"{path}: no image that can be read ({error}); delete it or replace it")
        cut = _middle(image, self._size) if part is None else _cut(image, part, whole, self._size)
        bytes_CHW: Tensor = functional.pil_to_tensor(cut)
        return bytes_CHW


class _Orders:
    """What a loader reads next, a list a batch."""

    def __init__(self) -> None:
        self.batches: list[list[_Order]] = []

    def __iter__(self) -> Iterator[list[_Order]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Loader:
    """A DataLoader whose workers stay from epoch to epoch: to start many takes seconds."""

    def __init__(self, images: _Images, workers: int, pinned: bool) -> None:
        self._orders = _Orders()
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=self._orders,
            num_workers=workers,
            collate_fn=_collated,
            pin_memory=pinned,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the default draws a number from the global generator
        )

    def read(self, orders: list[list[_Order]]) -> Iterator[Tensor | FileFault]:
        """The images of each batch, stacked."""
        self._orders.batches = orders
        return iter(self._loader)


class _Loaders:
    """A source's loaders while nobody reads with them. A copy of the source has its own."""

    def __init__(self) -> None:
        self._free: dict[tuple[Split, bool, int], _Loader] = {}

    def __reduce__(self) -> tuple[type["_Loaders"], tuple[()]]:
        return _Loaders, ()

    @contextmanager
    def taken(self, split: Split, images: _Images, on_gpu: bool, pinned: bool) -> Iterator[_Loader]:
        """A loader for one pass. A second pass at the same time has another one."""
        key = split, pinned, _workers(on_gpu)
        loader = self._free.pop(key, None) or _Loader(images, key[2], pinned)
        try:
            yield loader
        except Exception:
            raise  # its workers may be gone
        except GeneratorExit:  # a pass that was not read to its end
            self._free.setdefault(key, loader)
            raise
        self._free.setdefault(key, loader)


def _collated(images: list[Tensor | FileFault]) -> Tensor | FileFault:
    faults = [image for image in images if isinstance(image, FileFault)]
    return faults[0] if faults else torch.stack([image for image in images if isinstance(image, Tensor)])


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The centre square, for evaluation."""
    part: Image.Image = functional.center_crop(functional.resize(image, [round(size * _MARGIN)]), [size, size])
    return part


class _Part(NamedTuple):
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def _random_part(width: int, height: int, generator: torch.Generator) -> _Part:
    """A random part of random shape, mirrored half of the time, of an image of this size."""
    area, ratio, down, right, flip = torch.rand(5, generator=generator).tolist()
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * width * height
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
    part_width = min(width, max(1, round((area * ratio) ** 0.5)))
    part_height = min(height, max(1, round((area / ratio) ** 0.5)))
    top, left = round(down * (height - part_height)), round(right * (width - part_width))
    return _Part(top, left, part_height, part_width, flip < 0.5)


def _cut(image: Image.Image, part: _Part, whole: tuple[int, int], size: int) -> Image.Image:
    """A part of an image as a square. whole: the width and height that the part is of; the image may be smaller."""
    cut: Image.Image
    if image.size == whole:
        cut = functional.resized_crop(image, *part[:4], [size, size])
    else:
        across, down = image.width / whole[0], image.height / whole[1]
        right, bottom = (part.left + part.width) * across, (part.top + part.height) * down
        cut = image.resize(
            (size, size), Image.Resampling.BILINEAR, box=(part.left * across, part.top * down, right, bottom)
        )
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if part.mirrored else cut


def _pixels_wanted(whole: tuple[int, int], part: _Part | None, size: int) -> tuple[int, int]:
    """The least width and height of a whole image whose part, or whose middle, has at least `size` pixels a side."""
    width, height = whole
    if part is None:
        scale = round(size * _MARGIN) / min(whole)
        return math.ceil(width * scale), math.ceil(height * scale)
    return math.ceil(width * size / part.width), math.ceil(height * size / part.height)


def _workers(on_gpu: bool = False) -> int:
    """As many as torch's threads. None for one thread, and in a process that may have no children.

    A GPU leaves the cores to them, and takes thousands of images a second.
    """
    if torch.get_num_threads() < 2 or multiprocessing.current_process().daemon:
        return 0
    return min(torch.get_num_threads(), _MOST_WORKERS_GPU if on_gpu else _MOST_WORKERS)


def _existing(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileFault(f"{root}: has no folder {' or '.join(names)}: make one, with a subfolder of images for each class")


def _listed(folder: Path) -> tuple[Listing, list[str]]:
    try:
        found = ImageFolder(folder)
    except (FileNotFoundError, OSError) as error:
        raise FileFault(f"{folder}: {error}") from error
    return found.samples, found.classes

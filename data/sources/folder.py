"""A folder of the user's own images, one subfolder a class, read from the disk by the workers of a DataLoader."""

import copy
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional

from data.sources.base import Batch, Plan, Source, Split, generator_for, stratified
from data.sources.memory import Look
from predictor.errors import FileFault, UsageError

Listing: TypeAlias = list[tuple[str, int]]
"""(path, label) of each image of a split."""

# ImageNet's, as the pretrained networks of torchvision and timm expect.
_LOOK = Look(mean=(123.7, 116.3, 103.5), deviation=(58.4, 57.1, 57.4), flip=True)
_MARGIN = 256 / 224  # the shorter side before the crop, relative to the size
_AREA, _RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of a random crop
_MOST_WORKERS = 8


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
    """

    kind = "image"
    augmentable = True

    def __init__(self, name: str, classes: int, train: Listing, test: Listing, size: int) -> None:
        self.name, self.classes = name, classes
        self.shape = (3, size, size)
        self._listing: dict[Split, Listing] = {"train": train, "test": test}
        self._labels = {split: torch.tensor([label for _, label in rows]) for split, rows in self._listing.items()}

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
        return twin

    def _load(self, split: Split, plan: Plan, device: torch.device) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            _Images([path for path, _ in self._listing[split]], self.shape[1], plan),
            batch_sampler=[ids_B.tolist() for ids_B in plan.ids],
            num_workers=_workers(),
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default draws a number from the global generator
        )
        for ids_B, images in zip(plan.ids, loader, strict=True):
            if isinstance(images, FileFault):
                raise images
            x_BCHW = _LOOK.normalized(images.to(device, non_blocking=True))
            yield ids_B, x_BCHW, self._labels[split][ids_B].to(device, non_blocking=True)


class _Images(Dataset[Any]):
    """Reads one image_CHW as uint8, or returns the fault, which a worker would raise with a page of traceback."""

    def __init__(self, paths: list[str], size: int, plan: Plan) -> None:
        self._paths, self._size = paths, size
        self._seeds = (plan.seed, plan.epoch) if plan.augment else None

    def __getitem__(self, index: int) -> Tensor | FileFault:
        path = self._paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL's for broken files
            return FileFault(f"{path}: no image that can be read ({error}); delete it or replace it")
        if self._seeds:
            image = _random_part(image, self._size, generator_for(*self._seeds, index))
        else:
            image = _middle(image, self._size)
        bytes_CHW: Tensor = functional.pil_to_tensor(image)
        return bytes_CHW


def _collated(images: list[Tensor | FileFault]) -> Tensor | FileFault:
    faults = [image for image in images if isinstance(image, FileFault)]
    return faults[0] if faults else torch.stack([image for image in images if isinstance(image, Tensor)])


def _middle(image: Image.Image, size: int) -> Image.Image:
    """The centre square, for evaluation."""
    part: Image.Image = functional.center_crop(functional.resize(image, [round(size * _MARGIN)]), [size, size])
    return part


def _random_part(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """A random part of random shape, mirrored half of the time, for training."""
    area, ratio, down, right, flip = torch.rand(5, generator=generator).tolist()
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * image.width * image.height
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
    width = min(image.width, max(1, round((area * ratio) ** 0.5)))
    height = min(image.height, max(1, round((area / ratio) ** 0.5)))
    top, left = round(down * (image.height - height)), round(right * (image.width - width))
    part: Image.Image = functional.resized_crop(image, top, left, height, width, [size, size])
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else part


def _workers() -> int:
    """As many as torch's threads. None for one thread, and in a process that may have no children."""
    if torch.get_num_threads() < 2 or multiprocessing.current_process().daemon:
        return 0
    return min(torch.get_num_threads(), _MOST_WORKERS)


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

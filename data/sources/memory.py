"""Data sets that fit into memory. A split is on the device as a whole, and a batch is one gather."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from data.sources.base import Batch, Plan, Source, Split, generator_for, on_device, stratified

AnyMemorySource = TypeVar("AnyMemorySource", bound="MemorySource")


@dataclass(frozen=True)
class Samples:
    """One split: inputs_NCHW as uint8 or inputs_NT as int64, and labels_N as int64."""

    inputs: Tensor
    labels: Tensor

    def at(self, ids_B: Tensor) -> "Samples":
        """The samples with these ids."""
        return Samples(self.inputs.index_select(0, ids_B), self.labels.index_select(0, ids_B))

    def of_classes(self, classes: range) -> "Samples":
        """The samples of consecutive classes, with labels that start from 0 again."""
        chosen_N = (self.labels >= classes.start) & (self.labels < classes.stop)
        part = self.at(chosen_N.nonzero()[:, 0])
        return Samples(part.inputs, part.labels - classes.start)

    def to(self, device: torch.device) -> "Samples":
        """The same on another device."""
        return Samples(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Look:
    """How stored bytes become inputs of a network, and the augmentation that keeps the class of an image."""

    mean: tuple[float, ...]
    """Mean of each channel, in bytes."""
    deviation: tuple[float, ...]
    """Standard deviation of each channel, in bytes."""
    shift: int = 0
    """Augmentation moves an image by up to so many pixels in each direction, and pads with zeros."""
    flip: bool = False
    """Augmentation mirrors half of the images left to right."""

    def normalized(self, bytes_BCHW: Tensor) -> Tensor:
        """x_BCHW, float32: (byte - mean) / deviation."""
        mean_C11, deviation_C11 = _constants(self, bytes_BCHW.device)
        return bytes_BCHW.float().sub_(mean_C11).div_(deviation_C11)


@functools.cache
def _constants(look: Look, device: torch.device) -> tuple[Tensor, Tensor]:
    """mean_C11 and deviation_C11, copied to the device once: a copy for each batch would stall a GPU."""
    mean_C, deviation_C = torch.tensor([look.mean, look.deviation], device=device)
    return mean_C.view(-1, 1, 1), deviation_C.view(-1, 1, 1)


class MemorySource(Source):
    """Both splits in memory. A split is copied to a device once, with the first batch."""

    def __init__(self, name: str, classes: int, train: Samples, test: Samples) -> None:
        self.name, self.classes = name, classes
        self.shape = tuple(train.inputs.shape[1:])
        self.samples: dict[Split, Samples] = {"train": train, "test": test}
        self._moved: dict[tuple[Split, torch.device], Samples] = {}

    def labels(self, split: Split) -> Tensor:
        """labels_N of a split, int64, on the CPU, in the order of the ids."""
        return self.samples[split].labels

    def limited(self: AnyMemorySource, train_samples: int) -> AnyMemorySource:
        """The source with `train_samples` training samples, each class in proportion. Their ids start from 0 again."""
        twin = copy.copy(self)
        train = self.samples["train"].at(stratified(self.labels("train"), train_samples))
        twin.samples, twin._moved = {"train": train, "test": self.samples["test"]}, {}
        return twin

    def of_classes(self: AnyMemorySource, name: str, classes: range) -> AnyMemorySource:
        """The samples of consecutive classes under another name, with labels and ids that start from 0 again.

        Text keeps the whole vocabulary, so that a network can move from one part of the classes to another.
        """
        twin = copy.copy(self)
        twin.name, twin.classes, twin._moved = name, len(classes), {}
        twin.samples = {split: samples.of_classes(classes) for split, samples in self.samples.items()}
        return twin

    def _load(self, split: Split, plan: Plan, device: torch.device) -> Iterator[Batch]:
        if (split, device) not in self._moved:
            self._moved[split, device] = self.samples[split].to(device)
        samples = self._moved[split, device]
        for batch_number, ids_B in enumerate(plan.ids, plan.start):
            batch = samples.at(on_device(ids_B, device))
            yield ids_B, self._prepared(batch.inputs, plan, batch_number), batch.labels

    def _prepared(self, inputs: Tensor, plan: Plan, batch: int) -> Tensor:
        """The inputs of one batch as the network gets them. batch: its number in the epoch."""
        return inputs


class ImageSource(MemorySource):
    """Images as bytes in memory, normalized and augmented batch by batch, on the device."""

    kind = "image"

    def __init__(self, name: str, classes: int, train: Samples, test: Samples, look: Look) -> None:
        super().__init__(name, classes, train, test)
        self.look = look
        self.augmentable = bool(look.shift) or look.flip

    def _prepared(self, inputs: Tensor, plan: Plan, batch: int) -> Tensor:
        if plan.augment:
            inputs = shift_and_flip(inputs, self.look, generator_for(plan.seed, plan.epoch, batch))
        return self.look.normalized(inputs)


class TokenSource(MemorySource):
    """Texts as token sequences of one length in memory."""

    kind = "text"

    def __init__(self, name: str, classes: int, train: Samples, test: Samples, words: tuple[str, ...]) -> None:
        super().__init__(name, classes, train, test)
        self.words = words
        self.vocabulary = len(words)


def shift_and_flip(bytes_BCHW: Tensor, look: Look, generator: torch.Generator) -> Tensor:
    """Move and mirror each image at random: a crop out of the padded image, in one gather.

    The random numbers are drawn on the CPU, so that the augmentation is the same on every device.
    """
    batch, channels, height, width = bytes_BCHW.shape
    device = bytes_BCHW.device
    moves_2B = torch.randint(0, 2 * look.shift + 1, (2, batch), generator=generator)
    mirror_B = torch.rand(batch, generator=generator) < (0.5 if look.flip else 0.0)
    down_B, right_B, mirrored_B = on_device(torch.cat([moves_2B, mirror_B[None]]), device)  # in one copy
    rows_BH = torch.arange(height, device=device) + down_B[:, None]
    columns_W = torch.arange(width, device=device)
    columns_BW = torch.where(mirrored_B.bool()[:, None], columns_W.flip(0), columns_W) + right_B[:, None]
    padded = pad(bytes_BCHW, [look.shift] * 4)
    index_BHW = rows_BH[:, :, None] * padded.shape[3] + columns_BW[:, None, :]
    index_BCP = index_BHW.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index_BCP).view_as(bytes_BCHW)

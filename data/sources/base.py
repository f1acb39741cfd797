"""What networks train on: the interface of every data set, and how its samples are ordered and chosen."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor

from predictor.errors import UsageError

Split: TypeAlias = Literal["train", "test"]
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""ids_B (int64, always on the CPU), x_BCHW (float32) or tokens_BT (int64), labels_B (int64)."""
Device: TypeAlias = torch.device | str


@dataclass(frozen=True)
class Plan:
    """Which samples come in which batch, and what the augmentation's random numbers depend on."""

    ids: tuple[Tensor, ...]
    """ids_B of each batch that is still to come."""
    start: int = 0
    """The number of the first of them in its epoch."""
    seed: int = 0
    """Seed of the training."""
    epoch: int = 0
    """Epoch, from 0."""
    augment: bool = False
    """Whether inputs are augmented."""


class Source(ABC):
    """A data set with a training split and a test split. Every sample has an id: its place in its split, from 0."""

    name: str
    """What `load_source` knows it by."""
    kind: Literal["image", "text"]
    """What its inputs are."""
    classes: int
    """Number of classes; labels count from 0."""
    shape: tuple[int, ...]
    """(C, H, W) of an image, (length,) of a token sequence."""
    vocabulary: int = 0
    """Tokens that there are, with 0 = padding and, where they are whole words, 1 = unknown; 0 for images."""
    augmentable: bool = False
    """Whether `augment=True` means something."""

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """labels_N of a split, int64, on the CPU, in the order of the ids."""

    @abstractmethod
    def limited(self, train_samples: int) -> Self:
        """The same source with `train_samples` training samples, each class with its share, counted from 0 anew."""

    @abstractmethod
    def _load(self, split: Split, plan: Plan, device: torch.device) -> Iterator[Batch]:
        """The batches of a plan."""

    def size(self, split: Split) -> int:
        """Samples in a split."""
        return len(self.labels(_known(split)))

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool,
        augment: bool = False,
        start: int = 0,
        device: Device = "cpu",
        drop_last: bool = False,
        among: Tensor | None = None,
    ) -> Iterator[Batch]:
        """The batches of one epoch: (ids_B, x_BCHW float32 or tokens_BT int64, labels_B int64).

        The order depends on (seed, epoch) and `among` alone, augmentation on (seed, epoch, batch or sample) alone;
        torch's global random numbers are neither used nor moved. Inputs and labels lie on `device`; ids stay on the
        CPU, where looking them up stalls no GPU.

        start: batches to leave out at the beginning; those that follow are what they would have been.
        drop_last: leave out a last batch that is not full.
        among: the ids of the samples to go through, int64 on the CPU, each once; by default all of the split.

        Raises UsageError for a batch size that gives no batch, for augmentation where there is none, and for an id that
        no sample has.
        """
        whole = self.size(split)
        if among is not None and len(among) and not 0 <= int(among.min()) <= int(among.max()) < whole:
            raise UsageError(f"among: the ids of {split} samples are 0 to {whole - 1}, and others were given")
        size = whole if among is None else len(among)
        if batch_size < 1 or (drop_last and batch_size > size):
            raise UsageError(f"batch_size={batch_size} with {size} {split} samples gives no batch: choose 1 to {size}")
        if augment and not self.augmentable:
            raise UsageError(f"augment=True: {self.name} has no augmentation; train it with augment=False")
        order_N = torch.randperm(size, generator=generator_for(seed, epoch)) if shuffle else torch.arange(size)
        if among is not None:
            order_N = among[order_N]
        if drop_last:
            order_N = order_N[: size - size % batch_size]
        ids = torch.split(order_N, batch_size)[start:]
        return self._load(split, Plan(ids, start, seed, epoch, augment), torch.device(device))

    def probe(self, samples: int, device: Device = "cpu") -> Tensor:
        """A fixed batch of `samples` test inputs, as many of each class as can be; all of them where there are fewer.

        It depends on nothing but the source: no seed, no augmentation.
        """
        if samples < 1:
            raise UsageError(f"samples={samples}: a probe batch needs at least one")
        ids_B = balanced(self.labels("test"), samples)
        return next(iter(self._load("test", Plan((ids_B,)), torch.device(device))))[1]


def generator_for(*keys: int | str) -> torch.Generator:
    """A generator of its own for these numbers and words, unrelated to near ones'; the global one stands still."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))  # torch's CPU generator keeps 32 bits of a seed


def balanced(labels_N: Tensor, samples: int) -> Tensor:
    """ids_B of `samples` samples: one of each class, another of each class, and so on, always the same ones."""
    ids_N, rank_N = _ranked(labels_N)
    return ids_N[torch.argsort(rank_N, stable=True)[:samples]]


def stratified(labels_N: Tensor, samples: int) -> Tensor:
    """Ascending ids of `samples` samples, each class with its share of them, always the same ones.

    A larger choice holds every smaller one, so training sets of several sizes are nested.
    """
    if not 1 <= samples <= len(labels_N):
        raise UsageError(f"{samples} samples out of {len(labels_N)}: choose 1 to {len(labels_N)}")
    ids_N, rank_N = _ranked(labels_N)
    # The r-th of c samples in its class stands at (r + 1/2) / c of the way: cutting there keeps the shares.
    share_N = (rank_N.double() + 0.5) / torch.bincount(labels_N)[labels_N[ids_N]]
    return ids_N[torch.argsort(share_N, stable=True)[:samples]].sort().values


def _ranked(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ids sorted by class, in a fixed random order inside each, and the place of each inside its class."""
    order_N = torch.randperm(len(labels_N), generator=generator_for(len(labels_N)))
    ids_N = order_N[torch.argsort(labels_N[order_N], stable=True)]
    counts_C = torch.bincount(labels_N)
    first_C = counts_C.cumsum(0) - counts_C
    return ids_N, torch.arange(len(labels_N)) - first_C[labels_N[ids_N]]


def _known(split: Split) -> Split:
    if split not in ("train", "test"):
        raise UsageError(f"split={split!r}: choose train or test")
    return split

"""The interface of every data set, and how its samples are ordered and chosen."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from predictor.errors import UsageError

Split: TypeAlias = Literal["train", "test"]
Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""ids_B (int64, always on the CPU), x_BCHW (float32) or tokens_BT (int64), labels_B (int64)."""
Device: TypeAlias = torch.device | str
AnySource = TypeVar("AnySource", bound="Source")


@dataclass(frozen=True)
class Plan:
    """Which samples are in which batch, and what the random numbers of the augmentation depend on."""

    ids: tuple[Tensor, ...]
    """ids_B of each remaining batch."""
    start: int = 0
    """The number of the first of them in the epoch."""
    seed: int = 0
    """Seed of the training run."""
    epoch: int = 0
    """Epoch, from 0."""
    augment: bool = False
    """Whether inputs are augmented."""


class Source(ABC):
    """A data set with a training split and a test split. Every sample has an id: its index in its split.

    A subclass implements `labels`, `limited` and `_load`.
    """

    name: str
    """The name that `load_source` takes."""
    kind: Literal["image", "text"]
    """Kind of the inputs."""
    classes: int
    """Number of classes; labels count from 0."""
    shape: tuple[int, ...]
    """(C, H, W) of an image, (length,) of a token sequence."""
    vocabulary: int = 0
    """Number of tokens, 0 for images. Token 0 is padding. Where tokens are whole words, token 1 is an unknown word."""
    augmentable: bool = False
    """Whether `augment=True` is allowed."""

    @abstractmethod
    def labels(self, split: Split) -> Tensor:
        """labels_N of a split, int64, on the CPU, in the order of the ids."""

    @abstractmethod
    def limited(self: AnySource, train_samples: int) -> AnySource:
        """The source with `train_samples` training samples, each class in proportion. Their ids start from 0 again."""

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

        The order depends on `seed`, `epoch` and `among` only. Augmentation depends on `seed`, `epoch` and the batch or
        sample only. Torch's global random state is neither used nor changed.

        Args:
            split: "train" or "test".
            batch_size: Samples in a batch.
            seed: Seed of the order and of the augmentation.
            epoch: Number of the epoch, which changes both.
            shuffle: Whether to shuffle the samples.
            augment: Whether to augment the inputs.
            start: Number of batches to skip at the beginning. The others stay as they are.
            device: Where inputs and labels go. Ids stay on the CPU, where a look-up stalls no GPU.
            drop_last: Whether to leave out a last batch that is not full.
            among: Ids of the samples to use, int64 on the CPU, each once. By default all of the split.

        Raises:
            UsageError: The batch size gives no batch, the source has no augmentation, or an id is out of range.
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
        """A fixed batch of `samples` test inputs, balanced over the classes. All of them where there are fewer.

        It depends on the source only: there is no seed and no augmentation.
        """
        if samples < 1:
            raise UsageError(f"samples={samples}: a probe batch needs at least one")
        ids_B = balanced(self.labels("test"), samples)
        return next(iter(self._load("test", Plan((ids_B,)), torch.device(device))))[1]


def generator_for(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded by these keys. Similar keys give unrelated numbers. The global one is not touched."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))  # torch's CPU generator keeps 32 bits of a seed


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device, by a copy that does not wait for the device's queue."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory CUDA first waits for what it has to do
    # Apple's GPUs read the memory later, when it may be gone.
    return tensor.to(device, non_blocking=device.type != "mps")


def balanced(labels_N: Tensor, samples: int) -> Tensor:
    """ids_B of `samples` samples: one of each class, then another of each, and so on. Always the same ones."""
    ids_N, rank_N = _ranked(labels_N)
    return ids_N[torch.argsort(rank_N, stable=True)[:samples]]


def stratified(labels_N: Tensor, samples: int) -> Tensor:
    """Ascending ids of `samples` samples, with each class in proportion. Always the same ones.

    A larger choice contains every smaller one.
    """
    if not 1 <= samples <= len(labels_N):
        raise UsageError(f"{samples} samples out of {len(labels_N)}: choose 1 to {len(labels_N)}")
    ids_N, rank_N = _ranked(labels_N)
    # The r-th of c samples of a class is at (r + 1/2) / c of the way: a cut there keeps the proportions.
    share_N = (rank_N.double() + 0.5) / torch.bincount(labels_N)[labels_N[ids_N]]
    return ids_N[torch.argsort(share_N, stable=True)[:samples]].sort().values


def _ranked(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ids sorted by class, in a fixed random order inside each, and the rank of each inside its class."""
    order_N = torch.randperm(len(labels_N), generator=generator_for(len(labels_N)))
    ids_N = order_N[torch.argsort(labels_N[order_N], stable=True)]
    counts_C = torch.bincount(labels_N)
    first_C = counts_C.cumsum(0) - counts_C
    return ids_N, torch.arange(len(labels_N)) - first_C[labels_N[ids_N]]


def _known(split: Split) -> Split:
    if split not in ("train", "test"):
        raise UsageError(f"split={split!r}: choose train or test")
    return split

"""Features in fewer bytes than they were computed in: how numbers are rounded, and from when on."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from predictor.cache.store import FeatureStore, Precision
from predictor.errors import UsageError

_LARGEST_HALF = torch.finfo(torch.float16).max
_LARGEST_CODE = 127
_SMALLEST_GROUP = 16
"""Numbers that share a scale, at least: its four bytes are then no more than a quarter of theirs."""


@dataclass(frozen=True)
class Compression:
    """From which share of frozen layers on features are kept in fewer bytes.

    Paper: progressive compression of "Rethinking the Potential of Layer Freezing" (Yang et al., 2025, arXiv
    2508.15033). Kept features are compressed with loss, the more so the more layers are frozen.

    Rule: features are kept as they were computed, then as float16, then as int8, by the share of the layers that the
    frozen prefix has reached when a cut is found.

    Differs: the paper gives the principle. The shares and the ways of rounding are ours.

    Cost: accuracy of each number, the same at each hit. In float16 it is 2^-11 of the number. In int8 it is 1/254 of
    the largest number with the same scale: of its channel in the same sample, or of all channels there where these have
    fewer than 16 numbers.

    Raises:
        UsageError: the shares are negative, or in the wrong order.
    """

    half_from: float = 0.25
    """The share from which on they are kept as float16: 0 for any prefix at all, above 1 for never."""
    int8_from: float = 0.5
    """The share from which on they are kept as int8, no smaller than the other."""

    def __post_init__(self) -> None:
        if not 0 <= self.half_from <= self.int8_from:
            raise UsageError(
                f"half_from={self.half_from}, int8_from={self.int8_from}: give shares of the layers from 0, the second "
                "no smaller than the first"
            )

    def precision(self, share: float) -> Precision:
        """How features are kept when this share of the layers is in the frozen prefix."""
        if share >= self.int8_from:
            return "int8"
        return "half" if share >= self.half_from else "full"


def precision_for(frozen: frozenset[int], layers: int, compression: Compression | None) -> Precision:
    """How features are kept when these of so many layers are frozen."""
    prefix = next((index for index in range(layers) if index not in frozen), layers)
    return "full" if compression is None else compression.precision(prefix / layers)


class CompressedStore(FeatureStore):
    """A FeatureStore whose rows come back rounded. Outputs that are no floating-point numbers, or one number a sample,
    are kept as they are.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        memory_bytes: int,
        directory: Path | str | None = None,
        device_bytes: int = 0,
        *,
        precision: Precision,
    ) -> None:
        parts = [compressed(leaf, precision) for leaf in like]
        super().__init__([part for each in parts for part in each], memory_bytes, directory, device_bytes)
        self.precision = precision
        self._parts = [len(each) for each in parts]
        self._whole = [(leaf.shape[1:], leaf.dtype) for leaf in like]

    @property
    def exact_bytes(self) -> int:
        """Bytes that the rows held would take as they were computed."""
        return len(self) * sum(prod(shape) * dtype.itemsize for shape, dtype in self._whole)

    def fits(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these tensors have rows of the kind that is kept here."""
        return [(leaf.shape[1:], leaf.dtype) for leaf in leaves] == self._whole

    def put(self, ids: Sequence[int], leaves: Sequence[Tensor]) -> None:
        """Keep the rows of these samples, in their order; a sample that is here already is replaced."""
        super().put(ids, [part for leaf in leaves for part in compressed(leaf.detach(), self.precision)])

    def unpacked(self, rows: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
        """What `fetch` gave, as it goes into the model: what is moved there is still compressed."""
        parts = iter(super().unpacked(rows, device))
        return [
            restored([next(parts) for _ in range(count)], dtype)
            for count, (_, dtype) in zip(self._parts, self._whole, strict=True)
        ]


def channel_dimension(leaf: Tensor) -> int:
    """Where an output has its channels: the last dimension of a sequence (B, T, D), else the second."""
    return 2 if leaf.dim() == 3 else 1


def has_channels(leaf: Tensor) -> bool:
    """Whether an output holds floating-point numbers, and more than one dimension of them."""
    return leaf.is_floating_point() and leaf.dim() > 1


def compressed(leaf: Tensor, precision: Precision) -> list[Tensor]:
    """What is stored of an output with a row for each sample.

    full: itself. half: float16, or itself where it is no longer than that; what float16 cannot hold, its largest
    number. int8: whole numbers from -127 to 127 and, float32, the scales that they are to be multiplied with.
    """
    if precision == "full" or not has_channels(leaf):
        return [leaf]
    if precision == "half":
        return [leaf if leaf.element_size() <= 2 else leaf.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()]
    scale = _scale(leaf)
    codes = (leaf.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return [codes.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), scale]


def restored(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The output again, rounded, from what `compressed` made of it."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    codes, scale = parts
    return (codes * scale).to(dtype)


def _scale(leaf: Tensor) -> Tensor:
    """The distance of two neighbours among the numbers that can be kept, float32, in a shape that spreads over the
    output's.
    """
    channel = channel_dimension(leaf)
    own = prod(leaf.shape[1:]) >= _SMALLEST_GROUP * leaf.shape[channel]
    within = [dim for dim in range(1, leaf.dim()) if dim != channel or not own]
    return leaf.float().abs().amax(within, keepdim=True) / _LARGEST_CODE

"""Rows of features by sample id: in memory up to a budget, then in memory-mapped files."""

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Precision: TypeAlias = Literal["full", "half", "int8"]
"""How numbers are kept: as they were computed, as float16, or as whole numbers of one byte and a scale."""
_BLOCK_BYTES = 64 << 20


class FeatureStore:
    """Keeps one row of each of several tensors for every sample.

    Args:
        like: tensors of the kind to keep, of any number of rows. Rows come back in their shape, dtype and memory
            format, since a convolution takes longer on another format than the one it works in.
        memory_bytes: what may be held in memory.
        directory: where the files with all further rows lie. They have no name any more and vanish with the process,
            however it ends.

    Raises:
        OSError: the disk is full; what was stored stays readable.
    """

    precision: Precision = "full"
    """How numbers are kept."""

    def __init__(
        self,
        like: Sequence[Tensor],
        memory_bytes: int,
        directory: Path | str | None = None,
    ) -> None:
        self._kinds = [(leaf.shape[1:], leaf.dtype) for leaf in like]
        self._orders = [_memory_order(leaf) for leaf in like]
        ordered = [leaf.permute(order) for leaf, order in zip(like, self._orders, strict=True)]
        self._shapes, self._dtypes = [leaf.shape[1:] for leaf in ordered], [leaf.dtype for leaf in ordered]
        self._memory_bytes = memory_bytes
        self._directory = directory
        self._row_of: dict[int, int] = {}
        self._blocks: list[list[Tensor]] = []
        self._row_bytes = sum(
            prod(shape) * dtype.itemsize for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
        )
        self._rows = max(1, _BLOCK_BYTES // max(self._row_bytes, 1))

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def bytes(self) -> int:
        """Bytes of the rows held."""
        return len(self._row_of) * self._row_bytes

    @property
    def exact_bytes(self) -> int:
        """Bytes that the same samples' rows would take as they were computed."""
        return self.bytes

    def fits(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these tensors have rows of the kind that is kept here."""
        return [(leaf.shape[1:], leaf.dtype) for leaf in leaves] == self._kinds

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether every one of these samples is here."""
        return all(i in self._row_of for i in ids)

    def absent(self, ids: Sequence[int]) -> list[int]:
        """Which of these samples are not here: their indices in `ids`."""
        return [index for index, i in enumerate(ids) if i not in self._row_of]

    def put(self, ids: Sequence[int], leaves: Sequence[Tensor]) -> None:
        """Keep the rows of these samples, in their order; a sample that is here already is replaced."""
        for i in ids:
            if i not in self._row_of:
                if len(self._row_of) == len(self._blocks) * self._rows:
                    self._blocks.append(self._new_block())
                self._row_of[i] = len(self._row_of)
        rows_B = torch.tensor([self._row_of[i] for i in ids])
        leaves = [leaf.detach().permute(order).cpu() for leaf, order in zip(leaves, self._orders, strict=True)]
        for block, inside_B, at_B in self._spread(rows_B):
            for kept, leaf in zip(self._blocks[block], leaves, strict=True):
                kept[at_B] = leaf[inside_B]

    def get(self, ids: Sequence[int], device: torch.device) -> list[Tensor]:
        """The rows of these samples, in their order, on `device`."""
        return self.unpacked(self.fetch(ids), device)

    def fetch(self, ids: Sequence[int]) -> list[Tensor]:
        """The rows of these samples as they lie here, read and nothing more, for `unpacked`."""
        rows = [self._row_of[i] for i in ids]
        if len(self._blocks) == 1:
            rows_B = torch.tensor(rows)
            return [kept.index_select(0, rows_B) for kept in self._blocks[0]]
        spots = [divmod(row, self._rows) for row in rows]
        return [
            torch.stack([self._blocks[block][leaf][at] for block, at in spots]) for leaf in range(len(self._shapes))
        ]

    def unpacked(self, rows: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """What `fetch` gave, as it goes into the model, on `device`."""
        return [leaf.to(device).permute(_inverse(order)) for leaf, order in zip(rows, self._orders, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All rows held, with their ids."""
        ids = list(self._row_of)
        rows = FeatureStore.unpacked(self, FeatureStore.fetch(self, ids), torch.device("cpu")) if ids else []
        return {"ids": torch.tensor(ids, dtype=torch.int64), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the rows of a store of the same kind. Raises OSError when the disk is full."""
        if len(state["ids"]):
            FeatureStore.put(self, state["ids"].tolist(), state["rows"])

    def _spread(self, rows_B: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """For each block concerned: its number, which of the batch lie in it, and where there."""
        block_B = rows_B // self._rows
        numbers = sorted(set(block_B.tolist()))
        inside = [(block_B == number).nonzero().squeeze(1) for number in numbers]
        return [(number, at, rows_B[at] % self._rows) for number, at in zip(numbers, inside, strict=True)]

    def _new_block(self) -> list[Tensor]:
        in_memory = (len(self._blocks) + 1) * self._rows * self._row_bytes <= self._memory_bytes
        make = self._in_memory if in_memory else self._in_file
        return [make((self._rows, *shape), dtype) for shape, dtype in zip(self._shapes, self._dtypes, strict=True)]

    def _in_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def _in_file(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        handle, name = tempfile.mkstemp(prefix="frozen-features-", dir=self._directory)
        try:
            # Reserved now: a write into a mapped file on a full disk would end the process.
            _reserve(handle, max(1, prod(shape) * dtype.itemsize))
            return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)


def _reserve(handle: int, size: int) -> None:
    """Take so many bytes of the disk for an empty file. Raises OSError when it has no more."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    zeros = bytes(min(size, 1 << 20))  # macOS has no such call
    while size > 0:
        size -= os.write(handle, zeros[:size])


def _memory_order(leaf: Tensor) -> tuple[int, ...]:
    """The dimensions from the one with the longest stride to that with the shortest, the rows first of all."""
    return (0, *sorted(range(1, leaf.dim()), key=leaf.stride, reverse=True))


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))

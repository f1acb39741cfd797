"""Rows of features by sample id: on their device up to a budget, then in memory, then in memory-mapped files."""

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
        device_bytes: what may be held where the tensors lie, such as on a GPU, before anything goes to memory.

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
        device_bytes: int = 0,
    ) -> None:
        self.devices = [leaf.device for leaf in like]
        """Where each of the tensors was computed, and comes back to."""
        self._kinds = [(leaf.shape[1:], leaf.dtype) for leaf in like]
        self._orders = [_memory_order(leaf) for leaf in like]
        ordered = [leaf.permute(order) for leaf, order in zip(like, self._orders, strict=True)]
        self._shapes, self._dtypes = [leaf.shape[1:] for leaf in ordered], [leaf.dtype for leaf in ordered]
        self._memory_bytes, self._device_bytes = memory_bytes, device_bytes
        self._directory = directory
        self._row_of: dict[int, int] = {}
        self._blocks: list[list[Tensor]] = []
        self._row_bytes = sum(
            prod(shape) * dtype.itemsize for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
        )
        self._rows = max(1, _BLOCK_BYTES // max(self._row_bytes, 1))
        self._on_device = 0  # bytes of the blocks that lie where the tensors do

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def bytes(self) -> int:
        """Bytes of the rows held."""
        return len(self._row_of) * self._row_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes reserved where the tensors lie, such as on a GPU."""
        return self._on_device

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
        ordered = [leaf.detach().permute(order) for leaf, order in zip(leaves, self._orders, strict=True)]
        for block, inside, at in self._spread([self._row_of[i] for i in ids]):
            for kept, leaf in zip(self._blocks[block], ordered, strict=True):
                part = leaf if len(inside) == len(ids) else leaf.index_select(0, index_of(inside, leaf.device))
                if at == list(range(at[0], at[0] + len(at))):  # as always but for samples that are replaced
                    kept[at[0] : at[0] + len(at)].copy_(part)
                else:
                    kept.index_copy_(0, index_of(at, kept.device), part.to(kept.device))

    def get(self, ids: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
        """The rows of these samples, in their order, where they were computed, or on `device`."""
        return self.unpacked(self.fetch(ids), device)

    def fetch(self, ids: Sequence[int]) -> list[Tensor]:
        """The rows of these samples as they lie here, read and nothing more, for `unpacked`.

        Rows that lie in memory are read into page-locked memory where they go to a GPU.
        """
        rows = [self._row_of[i] for i in ids]
        return [self._gathered(leaf, rows) for leaf in range(len(self._shapes))]

    def unpacked(self, rows: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
        """What `fetch` gave, as it goes into the model: where the tensors were computed, or on `device`."""
        devices = self.devices if device is None else [device] * len(rows)
        return [
            moved(leaf, to).permute(_inverse(order))
            for leaf, to, order in zip(rows, devices, self._orders, strict=True)
        ]

    def moved(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """What `fetch` gave, where the tensors were computed. Nobody waits for that where they lie on a GPU."""
        return [moved(leaf, to) for leaf, to in zip(rows, self.devices, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All rows held, with their ids."""
        ids = list(self._row_of)
        rows = FeatureStore.unpacked(self, FeatureStore.fetch(self, ids), torch.device("cpu")) if ids else []
        return {"ids": torch.tensor(ids, dtype=torch.int64, device="cpu"), "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the rows of a store of the same kind. Raises OSError when the disk is full."""
        if len(state["ids"]):
            FeatureStore.put(self, state["ids"].tolist(), state["rows"])

    def _gathered(self, leaf: int, rows: Sequence[int]) -> Tensor:
        device = self.devices[leaf]
        blocks = [block[leaf] for block in self._blocks]
        if len(blocks) == 1:
            return _selected(blocks[0], rows, device)
        spots = [divmod(row, self._rows) for row in rows]
        here = [index for index, (block, _) in enumerate(spots) if blocks[block].device == device]
        views = [blocks[block][at] for block, at in spots]
        if len(here) == len(rows) or not here:
            return _stacked(views, device)
        first = set(here)
        there = [index for index in range(len(rows)) if index not in first]
        parts = [_stacked([views[index] for index in each], device) for each in (here, there)]
        place = {index: at for at, index in enumerate((*here, *there))}
        whole = torch.cat([moved(part, device) for part in parts])
        return whole.index_select(0, index_of([place[index] for index in range(len(rows))], device))

    def _spread(self, rows: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
        """For each block concerned: its number, which of the batch lie in it, and where there."""
        spots = [divmod(row, self._rows) for row in rows]
        return [
            (
                number,
                [index for index, (block, _) in enumerate(spots) if block == number],
                [at for block, at in spots if block == number],
            )
            for number in sorted({block for block, _ in spots})
        ]

    def _new_block(self) -> list[Tensor]:
        size = self._rows * self._row_bytes
        kinds = list(zip(self._shapes, self._dtypes, self.devices, strict=True))
        if self._on_device + size <= self._device_bytes:
            self._on_device += size
            return [torch.empty((self._rows, *shape), dtype=dtype, device=to) for shape, dtype, to in kinds]
        in_memory = (len(self._blocks) + 1) * size - self._on_device <= self._memory_bytes
        make = self._in_memory if in_memory else self._in_file
        return [make((self._rows, *shape), dtype) for shape, dtype, _ in kinds]

    def _in_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    def _in_file(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        handle, name = tempfile.mkstemp(prefix="frozen-features-", dir=self._directory)
        try:
            # Reserved now: a write into a mapped file on a full disk would end the process.
            _reserve(handle, max(1, prod(shape) * dtype.itemsize))
            return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Nobody waits for a GPU: the copy is queued, from page-locked memory."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # MPS copies from memory that may have been given to others by then.
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type != "mps")


def index_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """These numbers as an index of a tensor on this device."""
    return moved(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


def _selected(kept: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """These rows of a block, in page-locked memory where they go to a GPU."""
    return torch.index_select(kept, 0, index_of(rows, kept.device), out=_buffer(kept, len(rows), device))


def _stacked(views: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack(list(views), out=_buffer(views[0][None], len(views), device))


def _buffer(kept: Tensor, rows: int, device: torch.device) -> Tensor | None:
    if device.type != "cuda" or kept.device.type != "cpu":
        return None
    return torch.empty((rows, *kept.shape[1:]), dtype=kept.dtype, device="cpu", pin_memory=True)


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

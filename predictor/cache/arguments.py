"""What a model is called with: which arguments have a row for each sample, and whether they are the same as before."""

import operator
from collections.abc import Iterable, Sequence
from itertools import islice, product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from predictor.cache.store import index_of
from predictor.errors import UsageError

Layout: TypeAlias = "tuple[int | None, ...]"
"""For each argument the dimension of the samples; None for one that all samples share."""
Inputs: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""Positional and named arguments of a call."""
CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
"""Types of values that cannot change and can be compared."""
_MOST_LAYOUTS = 8
_INT64 = range(-(2**63), 2**63)
_HASHED_AT_ONCE = {"cpu": 1 << 18}  # which a processor's own memory holds
_HASHED_AT_ONCE_ELSEWHERE = 1 << 25
"""Words that are hashed at once, which takes a few times their memory."""


Ids: TypeAlias = "list[int] | Tensor"
"""Samples' ids, read; or a tensor of whole numbers that lies on a GPU still."""


def checked_ids(ids: Any) -> Ids:
    """Samples' ids. Those on a GPU are not waited for.

    Raises UsageError for anything but whole numbers of up to 64 bits, one a sample.
    """
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UsageError(
                f"ids of shape {tuple(ids.shape)} and type {ids.dtype}: give one whole number a sample, as of "
                "`ids.flatten().long()`"
            )
        if ids.device.type != "cpu" and ids.dtype != torch.uint64:
            return ids
        ids = ids.tolist()
    elif isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise UsageError(f"ids={ids!r}: give one whole number for each sample of the batch, in a list or a tensor")
    return [_whole(each) for each in ids]


def _whole(each: Any) -> int:
    kind = each.dtype if isinstance(each, Tensor) else type(each)
    try:
        number = None if kind in (bool, torch.bool) else operator.index(each)
    except TypeError:
        number = None
    if number is None:
        raise UsageError(
            f"id {each!r}: give each sample a whole number, such as its index in the data set, and not a "
            f"{type(each).__name__}"
        )
    if number not in _INT64:
        raise UsageError(f"id {each}: ids are kept as signed 64-bit numbers: take `id >> 1`, or the sample's index")
    return number


class Arguments:
    """The arguments of one call of a model, taken apart: `leaves` are tensors, numbers, strings and the like."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self._spec = tree_flatten((args, kwargs))

    def fault(self) -> str:
        """Why a pass on these cannot begin from kept features; empty where it can."""
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, CONSTANTS):
                    return (
                        f"the model is called with an object of type {type(leaf).__name__}, of which the cache cannot "
                        "know whether it is what it was"
                    )
            elif leaf.layout != torch.strided:
                return f"the model is called with a tensor of layout {leaf.layout}, which has no rows to compare"
            elif leaf.requires_grad and torch.is_grad_enabled():
                return "gradients of the model's inputs are wanted, and no gradient flows through kept features"
        return ""

    def layouts(self, batch: int) -> list[Layout]:
        """Which dimensions may be that of the samples, the likeliest first; none where there are no such dimensions.

        The first one takes the first dimension of the right size in each tensor.
        """
        options = [
            [*(dim for dim, size in enumerate(leaf.shape) if size == batch), None]
            if isinstance(leaf, Tensor)
            else [None]
            for leaf in self.leaves
        ]
        layouts = (each for each in product(*options) if any(dim is not None for dim in each))
        return list(islice(layouts, _MOST_LAYOUTS))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors with dimensions."""
        return [tuple(leaf.shape) for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.dim()]

    def rows_of_all(self) -> int | None:
        """The number of rows that all tensors have; None where they have other ones, or there are none."""
        rows = {shape[0] for shape in self.shapes}
        return rows.pop() if len(rows) == 1 else None

    def samples(self, layout: Layout) -> set[int]:
        """The numbers of samples that the arguments have by this layout: one, or several where it does not fit."""
        return {
            leaf.shape[dim] if isinstance(leaf, Tensor) and leaf.dim() > dim else -1
            for leaf, dim in zip(self.leaves, layout, strict=True)
            if dim is not None
        }

    def kind(self, layout: Layout) -> list[Any]:
        """Shape but for the samples, and type, of each tensor: lists and strings of them."""
        kinds: list[Any] = []
        for leaf, dim in zip(self.leaves, layout, strict=True):
            if isinstance(leaf, Tensor):
                shape = list(leaf.shape)
                kinds.append([shape if dim is None else shape[:dim] + shape[dim + 1 :], str(leaf.dtype)])
        return kinds

    def shared(self, layout: Layout) -> list[Any]:
        """The arguments that all samples share."""
        return [leaf for leaf, dim in zip(self.leaves, layout, strict=True) if dim is None]

    @property
    def versions(self) -> list[int]:
        """How often each tensor has been written to."""
        return [leaf._version for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def copied(self) -> Inputs:
        """Arguments of a call on the same samples, which may be written to."""
        return self._built([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])

    def rows(self, layout: Layout, indices: Sequence[int], shared: Sequence[Any] | None = None) -> Inputs:
        """Arguments of a call on the samples at these indices of the batch, which may be written to.

        shared: takes the place of the arguments that all samples share.
        """
        rest = iter(self.shared(layout) if shared is None else shared)
        leaves = []
        for leaf, dim in zip(self.leaves, layout, strict=True):
            if dim is None:
                other = next(rest)
                leaves.append(other.detach().clone() if isinstance(other, Tensor) else other)
            else:
                leaves.append(leaf.detach().index_select(dim, index_of(indices, leaf.device)))
        return self._built(leaves)

    def _built(self, leaves: list[Any]) -> Inputs:
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs


class Fingerprints:
    """Hashes of the samples' rows, the same ones each time and on each device."""

    def __init__(self) -> None:
        self._factors: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, arguments: Arguments, layout: Layout) -> Tensor:
        """One number a sample that changes when a bit of its rows does: prints_B, int32.

        They lie on the inputs' GPU, where there is one.
        """
        rows = [
            (index, leaf.detach().movedim(dim, 0))
            for index, (leaf, dim) in enumerate(zip(arguments.leaves, layout, strict=True))
            if dim is not None
        ]
        device = next((row.device for _, row in rows if row.device.type != "cpu"), rows[0][1].device)
        parts = [self._hashed(row, index).to(device, non_blocking=True) for index, row in rows]
        return (sum(parts[1:], start=parts[0]) >> 32).to(torch.int32)  # the upper bits are mixed best

    def _hashed(self, rows: Tensor, index: int) -> Tensor:
        words_BK = _words(rows)
        factors_K = self._factors_for(words_BK.shape[1], index, rows.device)
        most = _HASHED_AT_ONCE.get(rows.device.type, _HASHED_AT_ONCE_ELSEWHERE)
        some = max(1, most // max(1, words_BK.shape[1]))
        # The upper half is mixed into the lower one: what changes the first bit alone would change little otherwise.
        parts = [((each ^ (each >> 32)) * factors_K).sum(1) for each in torch.split(words_BK, some)]
        return torch.cat(parts)

    def _factors_for(self, size: int, index: int, device: torch.device) -> Tensor:
        key = size, index, device
        if key not in self._factors:
            generator = torch.Generator().manual_seed(index)
            factors_K = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator, device="cpu")
            self._factors[key] = factors_K.to(device)
        return self._factors[key]


def _words(rows: Tensor) -> Tensor:
    """The bits of each row as whole numbers, words_BK, int64."""
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    flat_BK = rows.reshape(len(rows), -1).contiguous()
    if flat_BK.dtype == torch.bool:
        flat_BK = flat_BK.to(torch.uint8)
    size = flat_BK.element_size()
    if flat_BK.numel() and flat_BK.shape[1] * size % 8 == 0 and flat_BK.storage_offset() * size % 8 == 0:
        return flat_BK.view(torch.int64)
    return flat_BK.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).to(torch.int64)


def changed(ids: Sequence[int], prints_B: Tensor, then_B: Tensor) -> str:
    """Which of these samples has other inputs than when its features were kept, in words; empty where none has."""
    odd = _first_apart(prints_B, then_B)
    return "" if odd is None else f"sample {ids[odd]} {NOT_WHAT_IT_WAS}"


NOT_WHAT_IT_WAS = (
    "is not what it was when its features were kept, as under random augmentation: train without the cache, switch the "
    "augmentation off, take an AugmentedCache, or say FeatureCache(..., check_inputs=False) to keep the features of "
    "the first time"
)


def named_twice(ids: Sequence[int], prints_B: Tensor) -> str:
    """Which id two different samples of a batch have, in words; empty where none. One sample may come twice."""
    if len(set(ids)) == len(ids):
        return ""
    firsts: dict[int, int] = {}
    indices = [firsts.setdefault(i, index) for index, i in enumerate(ids)]
    odd = _first_apart(prints_B, prints_B.index_select(0, torch.tensor(indices, device=prints_B.device)))
    return "" if odd is None else f"id {ids[odd]} names two different samples of a batch: give each one of its own"


def same_values(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two lists of shared arguments hold the same values. Waits for a GPU once at most."""
    if len(first) != len(second):
        return False
    results = []
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                return False
            results.append((a == b).all())
        elif type(a) is not type(b) or isinstance(a, Tensor) or not bool(a == b):
            return False
    return not results or bool(torch.stack([each.to(results[0].device) for each in results]).all())


def _first_apart(prints_B: Tensor, then_B: Tensor) -> int | None:
    """The index of the first sample whose fingerprints differ."""
    if torch.equal(prints_B, then_B):
        return None
    return int((prints_B != then_B).nonzero()[0])

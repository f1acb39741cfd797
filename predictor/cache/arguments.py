"""What a model is called with: which arguments have a row for each sample, and whether they are the same as before."""

import operator
from collections.abc import Iterable, Sequence
from itertools import islice, product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from predictor.errors import UsageError

Layout: TypeAlias = "tuple[int | None, ...]"
"""For each argument the dimension of the samples; None for one that all samples share."""
CONSTANTS = (type(None), bool, int, float, complex, str, bytes)
"""Types of values that cannot change and can be compared."""
_MOST_LAYOUTS = 8
_INT64 = range(-(2**63), 2**63)


def checked_ids(ids: Tensor | Iterable[int]) -> list[int]:
    """Samples' ids as whole numbers. Raises UsageError for anything else, and for numbers of more than 64 bits."""
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UsageError(
                f"ids of shape {tuple(ids.shape)} and type {ids.dtype}: give one whole number a sample, as of "
                "`ids.flatten().long()`"
            )
        numbers: list[int] = ids.tolist()
        return numbers
    numbers = []
    for each in ids:
        try:
            numbers.append(operator.index(each))
        except TypeError:
            raise UsageError(
                f"id {each!r}: give each sample a whole number, such as its index in the data set, and not a "
                f"{type(each).__name__}"
            ) from None
        if numbers[-1] not in _INT64:
            raise UsageError(f"id {each}: ids are kept as signed 64-bit numbers: take `id >> 1`, or the sample's index")
    return numbers


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
        """Which dimensions may be that of the samples, the likeliest first.

        The first one takes the first dimension of the right size in each tensor. Raises UsageError where there are
        tensors and none has such a dimension.
        """
        options = [
            [*(dim for dim, size in enumerate(leaf.shape) if size == batch), None]
            if isinstance(leaf, Tensor)
            else [None]
            for leaf in self.leaves
        ]
        if all(option == [None] for option in options):
            shapes = [tuple(leaf.shape) for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.dim()]
            if not shapes:
                return []
            raise UsageError(
                f"the model got no tensor with {batch} rows, one for each id, but shapes {shapes}: call it inside "
                "`cache.batch(ids)` on the samples that the ids name"
            )
        layouts = (each for each in product(*options) if any(dim is not None for dim in each))
        return list(islice(layouts, _MOST_LAYOUTS))

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

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call on the same samples, which may be written to."""
        return self._built([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])

    def rows(
        self, layout: Layout, indices: Sequence[int], shared: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
                leaves.append(leaf.detach().index_select(dim, torch.tensor(indices, device=leaf.device)))
        return self._built(leaves)

    def _built(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs


class Fingerprints:
    """Random projections of the samples' rows, the same ones each time."""

    def __init__(self) -> None:
        self._projections: dict[torch.Size, Tensor] = {}

    def __call__(self, arguments: Arguments, layout: Layout) -> Tensor:
        """One number a sample that changes when its rows do: prints_B, float32."""
        parts = []
        for leaf, dim in zip(arguments.leaves, layout, strict=True):
            if dim is not None:
                rows = leaf.detach().movedim(dim, 0)
                rows = torch.view_as_real(rows) if rows.is_complex() else rows
                parts.append(self._projected(rows.reshape(len(rows), -1).float()))
        return sum(parts[1:], start=parts[0])

    def _projected(self, flat_BK: Tensor) -> Tensor:
        projection_K = self._projection(flat_BK.shape[1:], flat_BK.device)
        if not torch.is_autocast_enabled(flat_BK.device.type):
            return flat_BK @ projection_K
        with torch.autocast(flat_BK.device.type, enabled=False):
            return flat_BK @ projection_K

    def _projection(self, shape: torch.Size, device: torch.device) -> Tensor:
        if shape not in self._projections:
            generator = torch.Generator().manual_seed(0)
            self._projections[shape] = torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
        return self._projections[shape].to(device)


def check_unchanged(ids: Sequence[int], prints_B: Tensor, then_B: Tensor) -> None:
    """Raise UsageError where one of these samples has other inputs than when its features were kept."""
    odd = _first_apart(prints_B, then_B)
    if odd is not None:
        raise UsageError(
            f"sample {ids[odd]} is not what it was when its features were kept, as under "
            "random augmentation: train without the cache, switch the augmentation off, take an AugmentedCache, or "
            "say FeatureCache(..., check_inputs=False) to keep the features of the first time"
        )


def check_unique(ids: Sequence[int], prints_B: Tensor) -> None:
    """Raise UsageError where two different samples of a batch have the same id. One sample may come twice."""
    if len(set(ids)) == len(ids):
        return
    firsts: dict[int, int] = {}
    indices = [firsts.setdefault(i, index) for index, i in enumerate(ids)]
    odd = _first_apart(prints_B, prints_B[indices])
    if odd is not None:
        raise UsageError(f"id {ids[odd]} names two different samples of a batch: give each sample a number of its own")


def same_values(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two lists of shared arguments hold the same values."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
        return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)

    return len(first) == len(second) and all(map(same, first, second))


def _first_apart(prints_B: Tensor, then_B: Tensor) -> int | None:
    """The index of the first sample whose fingerprints differ by more than rounding."""
    if torch.equal(prints_B, then_B):
        return None
    apart_B = (prints_B - then_B).abs() > 1e-3 * (1 + prints_B.abs())
    return int(apart_B.nonzero()[0]) if bool(apart_B.any()) else None

"""A part of a batch, as a data loader gives it."""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

_SHARE, _LEAST = 4, 4
_COLUMNS = 3
"""Up to so many tensors of one kind in a list are inputs and labels. More may be the samples themselves."""


def part_of(batch: Any) -> tuple[Any, float]:
    """A quarter of a batch's samples, at least 4, and which part of the batch that is.

    Every tensor, and every list of samples, has the samples as its first dimension. Where these differ in length, as
    where one is no batch, the batch stays whole. Nothing that is done to the tensors of a part changes the batch.
    """
    lengths = set(_lengths(batch))
    samples = lengths.pop() if len(lengths) == 1 else 0
    few = max(_LEAST, -(-samples // _SHARE))
    return (batch, 1.0) if samples <= few else (_cut(batch, few), few / samples)


def _lengths(value: Any) -> Iterable[int]:
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_nested
        return ([len(value)] if plain else [-1]) if value.dim() else []
    if _holds_samples(value):
        return [len(value)]
    items = value.values() if isinstance(value, MutableMapping) else value if _is_row(value) else ()
    return [length for each in items for length in _lengths(each)]


def _cut(value: Any, few: int) -> Any:
    if isinstance(value, Tensor):
        return value[:few].clone() if value.dim() else value
    if _holds_samples(value):
        return value[:few]
    if isinstance(value, MutableMapping):
        made = copy.copy(value)  # Transformers' batches are no dicts
        for name, each in value.items():
            made[name] = _cut(each, few)
        return made
    if not _is_row(value):
        return value
    items = [_cut(each, few) for each in value]
    return value._make(items) if hasattr(value, "_make") else type(value)(items)


def _is_row(value: Any) -> bool:
    return type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_make"))


def _holds_samples(value: Any) -> bool:
    """Whether the items of a list may be the samples, rather than inputs and labels."""
    return type(value) in (list, tuple) and len(value) > _COLUMNS and len(set(map(_kind, value))) == 1


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dim(), value.dtype
    return Mapping if isinstance(value, Mapping) else type(value)

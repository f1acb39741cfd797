"""What a pass of a model does besides giving its result: it draws random numbers, and leaves tensors in modules."""

import random
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from predictor.cache.watch import OF_EVERY_MODULE

Kept: TypeAlias = "dict[tuple[int, str], list[tuple[Tensor, int]]]"
"""Tensors by the module and the name under which it keeps them, and how often each had been written to."""
_MOST_ITEMS = 64


class Draws:
    """Says whether random numbers have been drawn since it was made: Python's, NumPy's, torch's or a module's own."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._devices = sorted({str(tensor.device) for tensor in tensors} - {"cpu", "meta"})
        values = (value for module in model.modules() for value in vars(module).values())
        self._generators = [value for value in values if isinstance(value, torch.Generator)]
        self._before = self._state()
        self._drawn = False

    def __bool__(self) -> bool:
        self._drawn = self._drawn or self._state() != self._before
        return self._drawn

    def _state(self) -> list[Any]:
        numpy = sys.modules.get("numpy")
        states = [torch.get_rng_state(), *(each.get_state() for each in self._generators)]
        states += [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        own = [state.numpy().tobytes() if numpy else tuple(state.tolist()) for state in map(Tensor.cpu, states)]
        return [random.getstate(), _plain(numpy.random.get_state(legacy=False)) if numpy else None, *own]


def _plain(value: Any) -> Any:
    """A generator's state as values that can be compared at once: with the bytes of arrays in their place."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.tobytes() if hasattr(value, "tobytes") else value


def kept_in(model: nn.Module) -> Kept:
    """The tensors that modules keep in buffers and in plain attributes."""
    kept: Kept = {}
    for number, module in enumerate(model.modules()):
        own = {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}
        for name, value in (*module._buffers.items(), *own.items()):
            plain = isinstance(value, Tensor | tuple | list | dict)
            some = plain and (isinstance(value, Tensor) or len(value) <= _MOST_ITEMS)
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] if some else []
            if leaves:
                kept[number, name] = [(leaf, leaf._version) for leaf in leaves]
    return kept


def left_by(model: nn.Module, before: Kept) -> dict[tuple[int, str], list[Tensor]]:
    """Copies of what modules keep in buffers and in plain attributes and did not keep before."""

    def marks(tensors: list[tuple[Tensor, int]]) -> list[tuple[int, int]]:
        return [(id(tensor), version) for tensor, version in tensors]

    return {
        key: [tensor.detach().clone() for tensor, _ in tensors]
        for key, tensors in kept_in(model).items()
        if marks(tensors) != marks(before.get(key, []))
    }

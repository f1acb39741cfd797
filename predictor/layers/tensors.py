"""The tensors inside nested values, such as a model's inputs and outputs."""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

Value = TypeVar("Value")
_SHARED = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.device, torch.dtype)
"""What a copy of a value has in common with the value."""


class WithoutMemory(Tensor):
    """A tensor that is computed only where something reads it. To copy it is to read it."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and other containers that PyTorch's pytrees know, in order."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def tensors_anywhere_in(value: object) -> list[Tensor]:
    """The tensors in any value, in order: also in dataclasses and in objects of the user's own classes."""
    collector = _Pickler()
    try:
        collector.dump(value)
    except Exception:  # something in it cannot be pickled
        return list(tensors_in(value))
    return [each for each in collector.apart if isinstance(each, Tensor)]


def copied(value: Value) -> Value:
    """A deep copy with copies of all tensors: what a pass pops or writes to is not the user's.

    Modules and functions in it are not copied. The copies of tensors want no gradients.

    Raises:
        Exception: something in it is neither a tensor nor can be pickled, such as a lock or an open file.
    """
    return converted(value, lambda tensor: tensor.detach().clone())


def converted(value: Value, convert: Callable[[Tensor], Tensor]) -> Value:
    """A deep copy with other tensors in it.

    Args:
        value: anything, such as a model's inputs.
        convert: makes the other tensor.

    Raises:
        Exception: something in it is neither a tensor nor can be pickled, such as a lock or an open file.
    """
    pickler = _Pickler()
    pickler.dump(value)
    others = [convert(each) if isinstance(each, Tensor) else _own(each) for each in pickler.apart]
    made: Value = _Unpickler(io.BytesIO(pickler.buffer.getvalue()), others).load()
    return made


def few_samples(value: Value, most: int = 2) -> Value:
    """The inputs of a model cut to its first samples, where their first dimension, or a list of them, is the batch.

    Args:
        value: the inputs: tuples, lists and dicts with tensors.
        most: the number of samples.
    """
    batch = _batch(value)
    made: Value = value if batch is None or batch[1] <= most else _cut(value, batch, most)
    return made


class Storages:
    """Notes on tensors by the memory that they share with others. It keeps no memory alive."""

    def __init__(self) -> None:
        self._notes: dict[int, Any] = {}
        # Weak references, so that no other storage gets the number of a freed one; the memory itself is freed.
        self._pins: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return number_of(tensor) in self._notes

    def get(self, tensor: Tensor, default: Any = None) -> Any:
        """The note on a tensor's memory."""
        return self._notes.get(number_of(tensor), default)

    def set(self, tensor: Tensor, note: Any) -> None:
        """Note something on a tensor's memory. Tensors without memory are passed over."""
        number = number_of(tensor)
        if number >= 0:
            if number not in self._pins:
                self._pins[number] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._notes[number] = note

    def drop(self, tensor: Tensor) -> None:
        """Forget what was noted on a tensor's memory."""
        self._notes.pop(number_of(tensor), None)


def number_of(tensor: Tensor) -> int:
    """A number that two tensors have in common if and only if they share memory; -1 for tensors without memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1


class _Pickler(pickle.Pickler):
    """Writes a value without its tensors and what copies share, which it keeps apart."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.apart: list[Any] = []
        self._number: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The number of what is kept apart; None for all else."""
        if not isinstance(value, (Tensor, torch.Generator, *_SHARED)):
            return None
        if id(value) not in self._number:
            self._number[id(value)] = len(self.apart)
            self.apart.append(value)
        return self._number[id(value)]


class _Unpickler(pickle.Unpickler):
    """Makes the value again around copies of what was kept apart."""

    def __init__(self, buffer: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(buffer)
        self._apart = apart

    def persistent_load(self, number: Any) -> Any:
        """The copy with this number."""
        return self._apart[number]


def _own(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        generator = torch.Generator(value.device)
        generator.set_state(value.get_state())
        return generator
    return value


def _batch(value: Any) -> tuple[bool, int] | None:
    """The number of samples, and whether they are the items of a list; None where it cannot be seen."""
    if isinstance(value, Tensor):
        return (False, len(value)) if value.dim() else None
    if isinstance(value, list) and len(value) > 1 and all(isinstance(each, (Tensor, Mapping)) for each in value):
        return True, len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for each in items if (found := _batch(each)) is not None), None)


def _cut(value: Any, batch: tuple[bool, int], most: int) -> Any:
    in_lists, samples = batch
    if isinstance(value, Tensor):
        return value[:most] if not in_lists and value.dim() and len(value) == samples else value
    if type(value) is list and in_lists and len(value) == samples:
        return value[:most]
    if type(value) in (list, tuple):
        return type(value)(_cut(each, batch, most) for each in value)
    if type(value) is dict:
        return {name: _cut(each, batch, most) for name, each in value.items()}
    return value

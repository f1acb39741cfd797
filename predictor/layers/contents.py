"""What a value holds, and what brings it back after a pass: in objects, containers, networks and generators."""

import argparse
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import partial
from types import (
    BuiltinMethodType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, TypeAlias
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from predictor.sieving import SampleQueue

Restore: TypeAlias = "Callable[[], object] | None"

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SEARCHED = 1000
"""Containers with more than this many items are not searched."""
_DEPTH = 8
_MOST = 20_000
"""Values that are looked at."""
_ARRAY_BYTES = 1 << 26
"""Of NumPy's arrays so much is copied. A write to one cannot be seen before it happens, as one to a tensor can."""
_DICTS: tuple[Any, ...] = (OrderedDict, dict)
_CONTAINERS: tuple[Any, ...] = (*_DICTS, list, set, deque)
_UNCHANGING = (bool, int, float, complex, str, bytes, type, ModuleType)
_LEFT_ALONE = sys.stdlib_module_names | {
    *("", "accelerate", "lightning", "lightning_fabric", "numpy", "predictor", "pytorch_lightning", "ray", "torch"),
    *("aim", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "tensorboardX", "wandb"),
}
"""Packages whose objects are not looked into: trainers, and trackers with threads of their own, are no part of a model.
The standard library's namespaces and containers are."""
_NAMESPACES = (argparse.Namespace, SimpleNamespace)


class Contents:
    """Makes what restores the content of values, of each once.

    Looked into are the attributes of the model, the loss and the loader, and those of objects in them. Of what code
    names, in closures and global variables, only objects of the packages that the model's classes, the loss and the
    loader are of: others, such as a trainer, are no part of it, and may have threads whose messages would be lost.

    Args:
        model: the model.
        others: what else is in use, such as a loss and a loader.
    """

    def __init__(self, model: nn.Module, others: Iterable[object]) -> None:
        owners = [*model.modules(), *others]
        self._packages = {_package(kind) for owner in owners for kind in (owner, *type(owner).__mro__)} - _LEFT_ALONE
        self._packages |= {"__main__", "transformers"}  # whose caches of keys and values are in other people's modules
        self.tensors: list[Tensor] = []
        """Tensors that were found and are no parameters."""
        self.modules: dict[nn.Module, None] = {}
        """Modules that were found. Their parameters and buffers are restored apart, like `tensors`."""
        self.code: list[Any] = []
        """Functions that were found, and classes of objects that were: more may be in what their code names."""
        self._seen: dict[int, object] = {}  # held, so that no other value gets the same id
        self._bytes_left = _ARRAY_BYTES

    def restore_of(self, value: Any, depth: int = _DEPTH, attribute: bool = False, given: bool = False) -> Restore:
        """What restores a value's content; None for what cannot change or is of another kind.

        Args:
            value: anything.
            depth: so deep values inside it are looked at.
            attribute: whether it is reached by attributes, and not by what code names.
            given: look into it, whatever it is an object of.
        """
        kind = type(value)
        if value is None or kind in ProxyTypes or isinstance(value, _UNCHANGING) or id(value) in self._seen:
            return None
        if len(self._seen) >= _MOST:
            return None
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors += [] if isinstance(value, nn.Parameter) else [value]
            return None
        if isinstance(value, nn.Module):
            return self._of_network(value)
        if isinstance(value, FunctionType):
            self.code += [value] if self._knows(_package(value), attribute) else []
            return None
        if isinstance(value, (MethodType, BuiltinMethodType)):
            if isinstance(value, MethodType):
                self.restore_of(value.__func__, depth, attribute)
            return self.restore_of(value.__self__, depth, attribute)
        if isinstance(value, partial):
            return self._of_all((value.func, *value.args, *value.keywords.values()), depth, attribute)
        if isinstance(value, GeneratorType):
            return self._of_all(_variables_of(value), depth, attribute)
        inside = given or self._looks_into(kind, attribute)
        return self._of_generator_or_array(value) or self._of_object(value, depth, inside, attribute)

    def _looks_into(self, kind: type, attribute: bool) -> bool:
        if issubclass(kind, (DataLoader, Dataset, Sampler, SampleQueue)) or kind in _NAMESPACES:
            return True
        # A user's own class of ours, such as a policy or a cache, notes what is to last.
        ours = any(_package(each) == "predictor" for each in kind.__mro__)
        return not ours and self._knows(_package(kind), attribute) and not issubclass(kind, Optimizer)

    def _knows(self, package: str, attribute: bool) -> bool:
        return package not in _LEFT_ALONE if attribute else package in self._packages

    def _of_all(self, values: Iterable[Any], depth: int, attribute: bool) -> Restore:
        return _together([self.restore_of(each, depth - 1, attribute) for each in values] if depth else [])

    def _of_network(self, network: nn.Module) -> Restore:
        """Of a module with all inside it."""
        new = [module for module in network.modules() if module not in self.modules]
        self.modules.update(dict.fromkeys(new))
        self._seen.update({id(module): module for module in new})
        self.code += dict.fromkeys(map(type, new))
        return _together([self._of_attributes(module, _DEPTH, attribute=True) for module in new])

    def _of_attributes(self, owner: Any, depth: int, attribute: bool) -> Restore:
        table = vars(owner)
        before = dict(table)
        skipped = _OF_EVERY_MODULE if isinstance(owner, nn.Module) else ()
        values = [value for name, value in before.items() if name not in skipped]
        return _together([partial(_put_back, table, before), self._of_all(values, depth, attribute)])

    def _of_generator_or_array(self, value: Any) -> Restore:
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            return partial(value.set_state, value.get_state())
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            return partial(value.setstate, value.getstate())
        if numpy is None:
            return None
        if isinstance(value, numpy.random.RandomState):
            return partial(value.set_state, value.get_state())
        if isinstance(value, numpy.random.Generator):
            value = value.bit_generator
        if isinstance(value, numpy.random.BitGenerator):
            return partial(setattr, value, "state", value.state)
        if isinstance(value, numpy.ndarray) and value.flags.writeable and value.nbytes <= self._bytes_left:
            self._bytes_left -= value.nbytes
            return partial(_write_to_array, value, value.copy())
        return None

    def _of_object(self, value: Any, depth: int, inside: bool, attribute: bool) -> Restore:
        """Of a container, and of an object with attributes, where it is looked into."""
        restores: list[Restore] = []
        kind = next((each for each in _CONTAINERS if isinstance(value, each)), tuple)
        if isinstance(value, kind):
            items = _items_of(value, kind)
            restores += [partial(_refill, value, kind, items)] if kind is not tuple else []
            if len(value) <= _SEARCHED:
                restores.append(self._of_all(items[1::2] if kind in _DICTS else items, depth, attribute))
        if inside:
            self.code.append(type(value))
            slots = [(slot, slot.__get__(value)) for slot in _slots_of(type(value)) if _is_set(slot, value)]
            restores += [partial(_put_in_slot, value, *each) for each in slots]
            restores.append(self._of_all((each for _, each in slots), depth, attribute))
            if isinstance(getattr(value, "__dict__", None), dict):
                restores.append(self._of_attributes(value, depth, attribute))
        return _together(restores)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


def _variables_of(generator: "GeneratorType[Any, Any, Any]") -> list[Any]:
    """What a generator, such as one of batches, has at hand: its variables, and the global ones that it names."""
    if generator.gi_frame is None:
        return []
    names, space = generator.gi_code.co_names, generator.gi_frame.f_globals
    return [*generator.gi_frame.f_locals.values(), *(space[name] for name in names if name in space)]


def _slots_of(kind: type) -> list[Any]:
    tables = [vars(each) for each in kind.__mro__ if "__slots__" in vars(each)]
    return [slot for table in tables for slot in table.values() if isinstance(slot, MemberDescriptorType)]


def _is_set(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


def _together(restores: Iterable[Restore]) -> Restore:
    found = [restore for restore in restores if restore is not None]
    return partial(_run, found) if found else None


def _run(restores: list[Callable[[], object]]) -> None:
    for restore in restores:
        restore()


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    for name in table.keys() - before.keys():
        del table[name]
    table.update({name: value for name, value in before.items() if table.get(name, table) is not value})


def _put_in_slot(value: Any, slot: Any, before: Any) -> None:
    slot.__set__(value, before)


def _items_of(value: Any, kind: Any) -> list[Any]:
    """The items of a container; of a dict, each key and its value by turns."""
    return [each for pair in kind.items(value) for each in pair] if kind in _DICTS else list(kind.__iter__(value))


def _refill(value: Any, kind: Any, items: list[Any]) -> None:
    # By the methods of the built-in class: a class of the user's own may do more in its own, or refuse.
    if list(map(id, _items_of(value, kind))) == list(map(id, items)):
        return
    kind.clear(value)
    if kind in _DICTS:
        for name, item in zip(items[::2], items[1::2], strict=True):
            kind.__setitem__(value, name, item)
    else:
        (kind.update if kind is set else kind.extend)(value, items)


def _write_to_array(value: Any, before: Any) -> None:
    if value.shape == before.shape:
        value[...] = before

"""What a value holds, and what brings it back after a pass: in objects, containers, networks and generators."""

import argparse
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
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
from typing import Any, NamedTuple, TypeAlias
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from predictor.sieving import SampleQueue

Restore: TypeAlias = Callable[[], object]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SEARCHED = 1000
"""Containers with more than this many items are not searched."""
_DEPTH = 8
_MOST = 20_000
"""Values that are looked at. Those that lie deepest in containers within containers come last."""
_ARRAY_BYTES = 1 << 26
"""Of NumPy's arrays so much is copied. A write to one cannot be seen before it happens, as one to a tensor can."""
_DICTS: tuple[Any, ...] = (OrderedDict, dict)
_CONTAINERS: tuple[Any, ...] = (*_DICTS, list, set, deque)
_HOLDERS: tuple[Any, ...] = (*_CONTAINERS, tuple)
_UNCHANGING = (bool, int, float, complex, str, bytes, type, ModuleType)
_LEFT_ALONE = sys.stdlib_module_names | {
    *("", "accelerate", "lightning", "lightning_fabric", "numpy", "predictor", "pytorch_lightning", "ray", "torch"),
    *("aim", "clearml", "comet_ml", "mlflow", "neptune", "swanlab", "tensorboard", "tensorboardX", "wandb"),
}
"""Packages whose objects are not looked into: trainers, and trackers with threads of their own, are no part of a model.
The standard library's namespaces and containers are."""
_NAMESPACES = (argparse.Namespace, SimpleNamespace)


class _Found(NamedTuple):
    """A value that is to be looked at."""

    value: Any
    depth: int
    """So deep values inside it are looked at."""
    nested: int
    """Containers that hold a container on the way to it."""
    attribute: bool
    given: bool = False


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
        self.restores: list[Restore] = []
        """What restores the values that were looked at."""
        self.tensors: list[Tensor] = []
        """Tensors that were found and are no parameters."""
        self.modules: dict[nn.Module, None] = {}
        """Modules that were found. Their parameters and buffers are restored apart, like `tensors`."""
        self._code: list[Any] = []
        self._waiting: list[deque[_Found]] = [deque() for _ in range(_DEPTH + 1)]  # by containers within containers
        self._seen: dict[int, object] = {}  # held, so that no other value gets the same id
        self._bytes_left = _ARRAY_BYTES

    def add(self, value: Any, attribute: bool = False, given: bool = False) -> None:
        """Have a value restored with what it holds. Nothing is looked at before `code` is run through.

        Args:
            value: anything.
            attribute: whether it is reached by attributes, and not by what code names.
            given: look into it, whatever it is an object of.
        """
        if _may_change(value):
            self._waiting[0].append(_Found(value, _DEPTH, 0, attribute, given))

    def code(self) -> Iterator[Any]:
        """Look at all values. Gives functions that are found, and classes of objects: their code may name more values,
        which are looked at before what lies in containers within containers.
        """
        while True:
            if self._waiting[0]:
                self._look_at(self._waiting[0].popleft())
            elif self._code:
                yield self._code.pop()
            elif bulk := next(filter(None, self._waiting), None):
                self._look_at(bulk.popleft())
            else:
                return

    def _find_all(self, values: Iterable[Any], within: "_Found", contained: bool = False) -> None:
        """Find what a value holds. contained: as a container does, and not as attributes."""
        if not within.depth:
            return
        levels = (within.nested, within.nested + contained)
        room = {level: _MOST - len(self._seen) - sum(map(len, self._waiting[: level + 1])) for level in levels}
        for value in values:
            level = levels[issubclass(type(value), _HOLDERS)]
            if room[level] > 0 and _may_change(value) and id(value) not in self._seen:
                room[level] -= 1
                self._waiting[level].append(_Found(value, within.depth - 1, level, within.attribute))

    def _look_at(self, found: "_Found") -> None:
        value = found.value
        if id(value) in self._seen or len(self._seen) >= _MOST:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors += [] if isinstance(value, nn.Parameter) else [value]
        elif isinstance(value, nn.Module):
            self._look_at_network(value)
        elif isinstance(value, FunctionType):
            self._code += [value] if self._knows(_package(value), found.attribute) else []
        elif isinstance(value, (MethodType, BuiltinMethodType)):
            function = [value.__func__] if isinstance(value, MethodType) else []
            self._find_all((*function, value.__self__), found)
        elif isinstance(value, partial):
            self._find_all((value.func, *value.args, *value.keywords.values()), found)
        elif isinstance(value, GeneratorType):
            self._find_all(_variables_of(value), found)
        elif (restore := self._of_generator_or_array(value)) is not None:
            self.restores.append(restore)
        else:
            self._look_at_object(found)

    def _looks_into(self, kind: type, attribute: bool) -> bool:
        if issubclass(kind, (DataLoader, Dataset, Sampler, SampleQueue)) or kind in _NAMESPACES:
            return True
        # A user's own class of ours, such as a policy or a cache, notes what is to last.
        ours = any(_package(each) == "predictor" for each in kind.__mro__)
        return not ours and self._knows(_package(kind), attribute) and not issubclass(kind, Optimizer)

    def _knows(self, package: str, attribute: bool) -> bool:
        return package not in _LEFT_ALONE if attribute else package in self._packages

    def _look_at_network(self, network: nn.Module) -> None:
        """Look at a module with all inside it."""
        new = [module for module in network.modules() if module not in self.modules]
        self.modules.update(dict.fromkeys(new))
        self._seen.update({id(module): module for module in new})
        self._code += dict.fromkeys(map(type, new))
        for module in new:
            self._look_at_attributes(_Found(module, _DEPTH, 0, attribute=True))

    def _look_at_attributes(self, found: "_Found") -> None:
        table = vars(found.value)
        before = dict(table)
        self.restores.append(partial(_put_back, table, before))
        skipped = _OF_EVERY_MODULE if isinstance(found.value, nn.Module) else ()
        self._find_all((value for name, value in before.items() if name not in skipped), found)

    def _of_generator_or_array(self, value: Any) -> Restore | None:
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

    def _look_at_object(self, found: "_Found") -> None:
        """Look at a container, and at an object with attributes where it is looked into."""
        value = found.value
        kind = next((each for each in _CONTAINERS if isinstance(value, each)), tuple)
        if isinstance(value, kind):
            items = _items_of(value, kind)
            self.restores += [partial(_refill, value, kind, items)] if kind is not tuple else []
            if len(value) <= _SEARCHED:
                self._find_all(items[1::2] if kind in _DICTS else items, found, contained=True)
        if found.given or self._looks_into(type(value), found.attribute):
            self._code.append(type(value))
            slots = [(slot, slot.__get__(value)) for slot in _slots_of(type(value)) if _is_set(slot, value)]
            self.restores += [partial(_put_in_slot, value, *each) for each in slots]
            self._find_all((each for _, each in slots), found)
            if isinstance(getattr(value, "__dict__", None), dict):
                self._look_at_attributes(found)


def _may_change(value: Any) -> bool:
    return value is not None and type(value) not in ProxyTypes and not isinstance(value, _UNCHANGING)


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

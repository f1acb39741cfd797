"""What features depend on besides their sample: weights, buffers, modes, plain attributes and hooks of the modules."""

import dis
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from predictor.cache.arguments import CONSTANTS
from predictor.cache.hooks import is_watched, number_of_hooks
from predictor.freezing.standstill import RECORD, mode_and_attributes

_READ = 1 << 12
"""How many numbers of a weight are read with each batch, for writes that PyTorch does not count (`weight.data`)."""
_MOST_ITEMS = 64
_WAITED_FOR = 4
"""After so many writes to a buffer on a GPU that left it as it was, nobody waits to compare it any more."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""
_LEFT_OUT = OF_EVERY_MODULE | {RECORD}
COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of numbers that every torch can add up and compare."""
_Key: TypeAlias = "tuple[int, str]"
_State: TypeAlias = "tuple[bool | None, int]"
"""A module's mode, None where nothing in it reads that, and how many attributes and buffers it has."""


class Held(NamedTuple):
    """A weight or a buffer, as it was."""

    owner: str
    table: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor
    version: int
    address: int
    kind: tuple[torch.dtype, torch.device]
    content: Tensor | None
    """A copy of a buffer; None for a weight."""

    @property
    def key(self) -> _Key:
        """What identifies it."""
        return id(self.table), self.name

    @property
    def touched(self) -> bool:
        """Whether it may be another one now: replaced, moved or written to."""
        now = self.table.get(self.name)
        if now is None or now is not self.tensor:
            return True
        return bool((now._version, _address(now), (now.dtype, now.device)) != (self.version, self.address, self.kind))

    @property
    def differs(self) -> bool:
        """Whether a buffer holds other numbers now, for which a GPU is waited for."""
        now, then = self.table.get(self.name), self.content
        if now is None or then is None or (now.shape, now.dtype, now.device) != (then.shape, then.dtype, then.device):
            return True
        try:
            return not torch.equal(now, then)
        except RuntimeError:  # there are kinds of tensors that cannot be compared
            return True


class Attribute(NamedTuple):
    """A plain attribute or a global name, as it was."""

    owner: str
    is_global: bool
    table: dict[str, Any]
    name: str
    value: Any
    content: Any
    """What is in a value that can change; None for one that cannot."""

    @property
    def key(self) -> _Key:
        """What identifies it."""
        return id(self.table), self.name

    @property
    def kind(self) -> type:
        """The type of what it is now."""
        return type(self.table.get(self.name))

    @property
    def differs(self) -> bool:
        """Whether it is another value now."""
        now = self.table.get(self.name)
        if now is self.value:
            return self.content is not None and bool(_content(now) != self.content)
        return bool(_content(now, constants=True) != _content(self.value, constants=True))


class StandIn:
    """Stands in for an attribute of this kind, to see whether anything reads it: one may count on, and nothing else."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For `isinstance`. Not of other kinds, such as a tensor, which torch would then take it for."""
        return self._kind if self._kind in CONSTANTS else StandIn

    def __add__(self, other: object) -> "StandIn":
        return self if isinstance(other, int | float) else NotImplemented

    __radd__ = __sub__ = __add__

    def __bool__(self) -> bool:
        raise TypeError

    def __eq__(self, other: object) -> bool:
        raise TypeError


class Watch:
    """Notices that features may be others now, at little cost.

    Args:
        modules: all that run before the features are there, and those that they are parts of.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._unread: set[_Key] = set()
        self._read: set[_Key] = set()
        self._as_before: Counter[_Key] = Counter()
        self.renew()

    def renew(self) -> None:
        """Take everything as it is now."""
        self._weights = list(_held(self._modules, "_parameters"))
        self._sums = _sums([held.tensor for held in self._weights])
        self._parts = [(module._modules, tuple(map(id, module._modules.values()))) for module in self._modules]
        self._hooks = sum(map(number_of_hooks, self._modules))
        self.renew_state()

    def renew_state(self) -> None:
        """Take all but weights, modules and hooks as it is now."""
        self._buffers = list(_held(self._modules, "_buffers"))
        self._heads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for held in (*self._weights, *self._buffers):
            if held.tensor.dtype in COMPARED and (head := _head(held.tensor)) is not None:
                self._heads.setdefault((head.device, head.dtype), []).append(head)
        self._norms = self.norms()
        self._states = [(module, _state_of(module)) for module in self._modules]
        self._attributes = list(_attributes(self._modules, self._unread))

    def norms(self) -> list[Tensor]:
        """The norms of what is read of each weight and buffer, one tensor for each device and type of numbers."""
        with torch.no_grad():
            return [torch.stack(_norms_of(heads)) for heads in self._heads.values()]

    def norms_differ(self) -> list[Tensor]:
        """Whether they are others now: as many tensors, true or false."""
        return [(now != then).any() for now, then in zip(self.norms(), self._norms, strict=True)]

    @property
    def trains(self) -> bool:
        """Whether something is trained again that features depend on."""
        return any(held.tensor.requires_grad for held in self._weights)

    @property
    def replaced(self) -> bool:
        """Whether a module is another one now."""
        return any(tuple(map(id, table.values())) != ids for table, ids in self._parts)

    @property
    def touched(self) -> bool:
        """Whether weights may be others now."""
        return any(held.touched for held in self._weights)

    @property
    def moved(self) -> bool:
        """Whether weights are others now. They are compared, which waits for a GPU.

        An average of weights that stands in for them while a model is tested writes to them, and they come back as they
        were.
        """
        now = list(_held(self._modules, "_parameters"))
        if [(held.name, held.kind) for held in now] != [(held.name, held.kind) for held in self._weights]:
            return True
        return _sums([held.tensor for held in now]) != self._sums

    @property
    def odd(self) -> bool:
        """Whether something else may not be what it was."""
        return (
            any(_differs(then, _state_of(module)) for module, then in self._states)
            or any(map(self._may_differ, self._buffers))
            or any(each.differs for each in self._attributes)
        )

    def changes(self, written: bool, numbers: bool = True) -> list[str]:
        """Names of what has another value than it had, weights aside.

        written: look at all buffers. numbers: also where a module has more or fewer attributes and buffers than it had.
        """
        states = [(module, then, _state_of(module)) for module, then in self._states]
        if not numbers:
            states = [(module, (then[0], now[1]), now) for module, then, now in states]
        names = [
            f"{type(module).__name__}'s {'attributes' if now[1] != then[1] else 'mode'}"
            for module, then, now in states
            if _differs(then, now)
        ]
        for held in self._buffers:
            if (written or self._may_differ(held)) and held.differs:
                names.append(f"{held.owner}.{held.name}")
            elif held.touched:
                self._as_before[held.key] += 1
        return names + [f"{each.owner}.{each.name}" for each in self._attributes if each.differs]

    def perhaps_unread(self) -> list[Attribute]:
        """Attributes that have another value, which no other one has too: whether anything reads them is to be seen."""
        values = [each.table.get(each.name) for each in self._attributes]

        def alone(value: Any) -> bool:
            return isinstance(value, CONSTANTS) or sum(value is other for other in values) == 1

        asked = [each for each in self._attributes if not each.is_global and each.key not in self._read]
        return [each for each in asked if each.differs and each.name in each.table and alone(each.table[each.name])]

    def note_unread(self, perhaps: Iterable[Attribute], unread: Iterable[Attribute]) -> None:
        """Note which attributes nothing in front reads. They are not looked at any more."""
        self._unread.update(each.key for each in unread)
        self._read.update({each.key for each in perhaps} - self._unread)
        self._attributes = [each for each in self._attributes if each.key not in self._unread]

    def _may_differ(self, held: Held) -> bool:
        """Whether a buffer is to be compared with what it was."""
        there = held.tensor.device.type != "cpu" and held.table.get(held.name) is held.tensor
        return held.touched and not (there and self._as_before[held.key] >= _WAITED_FOR)

    def hooked(self) -> str:
        """The name of a hook of the user's that was added since; empty where there is none."""
        if sum(map(number_of_hooks, self._modules)) == self._hooks:
            return ""
        return next((type(module).__name__ for module in self._modules[1:] if is_watched(module)), "")


def _held(modules: Iterable[nn.Module], kind: str) -> Iterator[Held]:
    for module in modules:
        table: Mapping[str, Tensor | None] = getattr(module, kind)
        for name, tensor in table.items():
            if tensor is not None and not tensor.is_inference():
                marks = tensor._version, _address(tensor), (tensor.dtype, tensor.device)
                content = tensor.detach().clone() if kind == "_buffers" else None
                yield Held(type(module).__name__, table, name, tensor, *marks, content)


def _state_of(module: nn.Module) -> _State:
    mode, names = mode_and_attributes(module)
    for buffer in module._buffers.values():
        names += buffer is not None
    return mode, names


def _differs(then: _State, now: _State) -> bool:
    """Whether a module may do something else now. That it is held since makes no difference where it reads no mode."""
    return now != then and (now[1] != then[1] or None not in (now[0], then[0]))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # some subclasses of tensors have no memory of their own
        return 0


def _head(tensor: Tensor) -> Tensor | None:
    """The first numbers of a tensor, in its memory; None where it has none."""
    if tensor.is_meta or not tensor.numel():
        return None
    plain = tensor.data  # a detached view would hold the tensor itself, which may be exchanged when a model is moved
    return plain[: max(1, _READ // plain[0].numel())] if plain.dim() else plain


def _norms_of(heads: list[Tensor]) -> list[Tensor]:
    wide = torch.promote_types(heads[0].dtype, torch.float32)
    try:
        return list(torch._foreach_norm(heads, 2, wide))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return [torch.linalg.vector_norm(head, dtype=wide) for head in heads]


@torch.no_grad()
def _sums(tensors: list[Tensor]) -> list[float]:
    """The sum and the norm of each: other weights have others."""
    real = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
    some = [each.detach() for each in real if each.dtype in COMPARED and not each.is_meta]
    wide = [torch.promote_types(each.dtype, torch.float32) for each in some]
    sums = [each.sum(dtype=dtype) for each, dtype in zip(some, wide, strict=True)]
    norms = [torch.linalg.vector_norm(each, dtype=dtype) for each, dtype in zip(some, wide, strict=True)]
    return read([*sums, *norms])


def read(numbers: list[Tensor]) -> list[float]:
    """Numbers from any devices, each of which is waited for once."""
    by_device: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(index)
    found: dict[int, float] = {}
    for device, indices in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([numbers[index].to(wide) for index in indices]).tolist()
        found.update(zip(indices, values, strict=True))
    return [found[index] for index in range(len(numbers))]


def _attributes(modules: Iterable[nn.Module], unread: Container[_Key]) -> Iterator[Attribute]:
    """What modules keep in plain attributes, and the global names that their `forward` reads."""
    seen: set[int] = set()  # such as a configuration that all modules share
    for module in modules:
        table, owner = vars(module), type(module).__name__
        for name, value in table.items():
            if name not in _LEFT_OUT and (id(table), name) not in unread:
                fixed = id(value) in seen or _is_fixed(value)
                yield Attribute(owner, False, table, name, value, None if fixed else _content(value))
                seen.add(id(value))
        if id(type(module)) not in seen and not type(module).__module__.startswith("torch."):
            yield from _globals(type(module))
        seen.add(id(type(module)))


@cache
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names that a function's code reads as global ones. Attributes are in `co_names` too."""
    loaded = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    return tuple(dict.fromkeys(loaded))


def _globals(kind: type[nn.Module]) -> Iterator[Attribute]:
    code, names = getattr(kind.forward, "__code__", None), getattr(kind.forward, "__globals__", {})
    for name in () if code is None else _global_names(code):
        value = names.get(name)
        content = None if isinstance(value, ModuleType | list) else _content(value)  # a list is mostly a log
        if content is not None or (value is not None and isinstance(value, CONSTANTS)):
            yield Attribute(kind.__module__, True, names, name, value, content)


def _is_fixed(value: Any) -> bool:
    """Whether a value is a tuple of constants, such as a convolution's stride."""
    return type(value) is tuple and all(isinstance(each, CONSTANTS) for each in value)


def _content(value: Any, depth: int = 2, constants: bool = False) -> Any:
    """What is in a value that can change, as something that can be compared; None for one that cannot change.

    constants: give values that cannot change too.
    """
    if isinstance(value, CONSTANTS):
        return (type(value), value) if constants else None
    if isinstance(value, Tensor):
        return (id(value), None if value.is_inference() else value._version)
    if isinstance(value, nn.Module | type) or callable(value) or depth == 0:
        return id(value) if constants else None
    if isinstance(value, list | tuple) and len(value) <= _MOST_ITEMS:
        return [_content(each, depth - 1, True) for each in value]
    if isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        return {name: _content(each, depth - 1, True) for name, each in value.items()}
    if hasattr(value, "__dict__"):  # such as a configuration
        return {name: each for name, each in vars(value).items() if isinstance(each, CONSTANTS)}
    return id(value) if constants else None

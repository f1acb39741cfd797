"""What features depend on besides their sample: weights, buffers, modes, plain attributes and hooks of the modules."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from predictor.cache.arguments import CONSTANTS
from predictor.cache.hooks import is_watched, number_of_hooks

_READ = 1 << 12
"""How many numbers of a weight are read with each batch, for writes that PyTorch does not count (`weight.data`)."""
_MOST_ITEMS = 64
_HARMLESS = 4
"""After so many changes of an attribute that changed no feature it is not looked at any more."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""
_COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Key: TypeAlias = "tuple[int, str]"


class Held(NamedTuple):
    """A weight or a buffer, as it was."""

    table: Mapping[str, Tensor | None]
    name: str
    tensor: Tensor
    version: int
    address: int
    kind: tuple[torch.dtype, torch.device]

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


class Attribute(NamedTuple):
    """A plain attribute or a global name, as it was."""

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
    def counts(self) -> bool:
        """Whether it is a number or the like, by which a schedule may go: it is looked at each time."""
        return isinstance(self.value, CONSTANTS)

    @property
    def differs(self) -> bool:
        """Whether it is another value now."""
        now = self.table.get(self.name)
        if now is self.value:
            return self.content is not None and bool(_content(now) != self.content)
        return bool(_content(now, constants=True) != _content(self.value, constants=True))


class Watch:
    """Notices that features may be others now, at little cost.

    Args:
        modules: all that run before the features are there, and those that they are parts of.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._harmless: Counter[_Key] = Counter()
        self.renew()

    def renew(self) -> None:
        """Take everything as it is now."""
        self._weights = list(_held(module._parameters for module in self._modules))
        buffers = _held(module._buffers for module in self._modules)
        self._buffers = [held for held in buffers if self._harmless[held.key] < _HARMLESS]
        self._sums = _sums([held.tensor for held in self._weights])
        self._heads = [
            head
            for held in (*self._weights, *self._buffers)
            if held.tensor.dtype in _COMPARED and (head := _head(held.tensor)) is not None
        ]
        self._norms = self.norms()
        self._modes = [(module, module.training, len(vars(module))) for module in self._modules]
        self._parts = [(module._modules, tuple(map(id, module._modules.values()))) for module in self._modules]
        self._hooks = sum(map(number_of_hooks, self._modules))
        self._attributes = [each for each in _attributes(self._modules) if self._harmless[each.key] < _HARMLESS]

    def norms(self) -> list[Tensor]:
        """The norms of what is read of each weight and buffer, one tensor a device."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for head in self._heads:
            by_device.setdefault(head.device, []).append(head)
        with torch.no_grad():
            return [torch.stack(_norms_of(heads)) for heads in by_device.values()]

    def norms_differ(self) -> list[Tensor]:
        """Whether they are others now: a tensor on each device, true or false."""
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
        now = list(_held(module._parameters for module in self._modules))
        if [(held.name, held.kind) for held in now] != [(held.name, held.kind) for held in self._weights]:
            return True
        return _sums([held.tensor for held in now]) != self._sums

    @property
    def odd(self) -> bool:
        """Whether something else is not what it was, which may or may not change features."""
        return (
            any(module.training != mode or len(vars(module)) != names for module, mode, names in self._modes)
            or any(held.touched for held in self._buffers)
            or any(each.differs for each in self._attributes)
        )

    def accept(self) -> None:
        """Take what is not what it was as harmless: features are the same."""
        self._harmless.update(each.key for each in self._attributes if each.differs and not each.counts)
        self._harmless.update(held.key for held in self._buffers if held.touched)
        self.renew()

    def hooked(self) -> str:
        """The name of a hook of the user's that was added since; empty where there is none."""
        if sum(map(number_of_hooks, self._modules)) == self._hooks:
            return ""
        return next((type(module).__name__ for module in self._modules[1:] if is_watched(module)), "")


def _held(tables: Iterable[Mapping[str, Tensor | None]]) -> Iterator[Held]:
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and not tensor.is_inference():
                yield Held(table, name, tensor, tensor._version, _address(tensor), (tensor.dtype, tensor.device))


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
    try:
        norms = list(torch._foreach_norm(heads))
    except (AttributeError, RuntimeError, NotImplementedError):
        norms = [torch.linalg.vector_norm(head) for head in heads]
    return [norm.double() if norm.device.type != "mps" else norm.float() for norm in norms]


@torch.no_grad()
def _sums(tensors: list[Tensor]) -> list[float]:
    """The sum and the norm of each: other weights have others."""
    real = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
    some = [each.detach() for each in real if each.dtype in _COMPARED and not each.is_meta]
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


def _attributes(modules: Iterable[nn.Module]) -> Iterator[Attribute]:
    """What modules keep in plain attributes, and the global names that their `forward` reads."""
    seen: set[int] = set()  # such as a configuration that all modules share
    for module in modules:
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE:
                yield Attribute(vars(module), name, value, None if id(value) in seen else _content(value))
                seen.add(id(value))
        if id(type(module)) not in seen and not type(module).__module__.startswith("torch."):
            yield from _globals(type(module))
        seen.add(id(type(module)))


def _globals(kind: type[nn.Module]) -> Iterator[Attribute]:
    code, names = getattr(kind.forward, "__code__", None), getattr(kind.forward, "__globals__", {})
    for name in () if code is None else code.co_names:
        value = names.get(name)
        if value is not None and isinstance(value, CONSTANTS):
            yield Attribute(names, name, value, None)


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

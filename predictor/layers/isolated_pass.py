"""Running the user's model so that it is afterwards as it was before."""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from predictor.layers.code_state import restores_of_code
from predictor.layers.hook_tables import restored_hooks
from predictor.layers.tensors import number_of, tensors_in

_isolated = ContextVar("isolated", default=False)
_shown = ContextVar("shown", default=False)
_modes: ContextVar[dict[nn.Module, bool] | None] = ContextVar("modes", default=None)


@contextmanager
def isolated(
    model: nn.Module, *, as_in_training: bool = False, gradients: bool = False, others: Iterable[object] = ()
) -> Iterator[None]:
    """A context in which a pass of the model leaves no trace.

    Inside, the model is in evaluation mode, records no gradients by default and runs eagerly, part by part. Afterwards
    these are what they were: every module's mode, every buffer and parameter (the object and its content), what modules
    keep in plain attributes, and the state of the random generators (Python's, NumPy's, torch's on the CPU and on the
    model's devices). The same holds for what the model's code keeps in its classes, in global variables and in caches:
    numbers, tensors, lists, dicts and `functools.lru_cache`. Nothing waits for a GPU.

    The caller gives the pass copies of the inputs (`predictor.layers.tensors.copied`). Forward hooks run, since many
    are part of a model (weight norm, pruning, adapters). What they keep is brought back like what the model's code
    keeps, so that a list of outputs holds those of the training alone.

    Args:
        model: the model.
        as_in_training: have the modules in the modes that the training has them in, and record gradients for all
            parameters, but nothing that a backward pass needs.
        gradients: record gradients in evaluation mode, for `torch.autograd.grad`, which leaves `.grad` alone. Random
            generators go on from where they are.
        others: further objects, such as a data loader's sampler, whose attributes are restored like those of modules.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"}
    others = [each for each in others if hasattr(each, "__dict__")]
    contents = _Contents(model, others)
    with ExitStack() as stack:
        stack.enter_context(restored_hooks(model))
        stack.callback(_isolated.reset, _isolated.set(True))
        stack.callback(_shown.reset, _shown.set(False))
        stack.enter_context(_restored_modes(model, evaluation=not as_in_training))
        stack.enter_context(_restored_attributes([*model.modules(), *others], contents))
        stack.enter_context(_restored_code(model, contents))
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_restored_random_state(devices, seeded=not gradients))
        stack.enter_context(_eager_part_by_part())
        stack.enter_context(_no_autocast_cache())
        recording = torch.enable_grad() if gradients else torch.no_grad()
        stack.enter_context(_all_requiring_gradients(model) if as_in_training else recording)
        stack.enter_context(_restored_parameters(model, contents.tensors))
        yield


def in_isolated_pass() -> bool:
    """Whether a pass of ours is under way, for hooks that are to see the training's alone."""
    return _isolated.get()


@contextmanager
def shown() -> Iterator[None]:
    """A context inside an isolated one in which the model is called as the training's next step will call it.

    What waits for that call to see the layers and their cost may take this one for it: see `hidden`.
    """
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def hidden() -> bool:
    """Whether a pass of ours is under way that says nothing of how the training calls the model."""
    return _isolated.get() and not _shown.get()


@contextmanager
def _restored_modes(model: nn.Module, evaluation: bool) -> Iterator[None]:
    # Not by eval() and train(): they may be overridden and do more than set a flag (adapters merge their weights).
    modes = [(module, module.training) for module in model.modules()]
    in_training = _modes.get() or dict(modes)  # of an isolated pass within another, those outside of both
    token = _modes.set(in_training)
    try:
        for module, mode in modes:
            module.training = in_training.get(module, mode) and not evaluation
        yield
    finally:
        _modes.reset(token)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(b, b.detach().clone()) for b in model.buffers() if _can_be_written(b)]
    try:
        yield
    finally:
        for table, before in tables:
            if {name: id(buffer) for name, buffer in table.items()} != {n: id(b) for n, b in before.items()}:
                table.clear()
                table.update(before)
        for buffer, content in contents:
            _write_back(buffer, content)


@contextmanager
def _restored_parameters(model: nn.Module, others: Iterable[Tensor]) -> Iterator[None]:
    """Restore parameters and others that a pass writes to, as one with a momentum encoder does. Only those are copied.

    Args:
        model: the model.
        others: tensors that are no parameters.
    """
    tables = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    # FSDP's and meta tensors have no memory here that could be compared.
    plain = [p for p in model.parameters() if type(p.data) is Tensor and _can_be_written(p)]
    data = [(parameter, parameter.data) for parameter in plain]
    keeper = _WriteKeeper([*plain, *filter(_can_be_written, others)])
    try:
        with keeper:
            yield
    finally:
        for table, before in tables:
            if {name: id(parameter) for name, parameter in table.items()} != {n: id(p) for n, p in before.items()}:
                table.clear()
                table.update(before)
        for parameter, held in data:
            if parameter.data_ptr() != held.data_ptr() or parameter.shape != held.shape:
                parameter.data = held
        for tensor, content in keeper.contents:
            _write_back(tensor, content)


class _WriteKeeper(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the content of tensors from before the first operator that writes to them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._whole: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self._whole.setdefault(number_of(tensor), []).append(tensor)
        self.contents: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in tensors_in((args, kwargs)):
                for whole in self._whole.pop(number_of(tensor), ()):
                    self.contents.append((whole, whole.detach().clone()))
        return func(*args, **kwargs)


@contextmanager
def _all_requiring_gradients(model: nn.Module) -> Iterator[None]:
    floats = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    still = [parameter for parameter in floats if not parameter.requires_grad]
    try:
        for parameter in still:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
            yield
    finally:
        for parameter in still:
            parameter.requires_grad_(False)


def _nothing(value: object) -> Any:
    """Keeps nothing for a backward pass, which never comes."""


@contextmanager
def _restored_random_state(devices: set[torch.device], seeded: bool) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu"}:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            if seeded:
                torch.default_generator.manual_seed(0)  # not torch.manual_seed: it seeds every device
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Without the casts that autocast keeps: those of a pass without gradients would give the training none either."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _eager_part_by_part() -> Iterator[None]:
    """Without torch.compile, and without attention's fused form, which calls no part of its layer."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if "torch._dynamo" in sys.modules:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SEARCHED = 1000
"""Containers with more than this many items are not searched for tensors."""
_DEPTH = 4
_CONTAINERS = (list, deque, set, dict, OrderedDict, defaultdict, Counter)


@contextmanager
def _restored_attributes(owners: Sequence[object], contents: "_Contents") -> Iterator[None]:
    """Restore what modules and others keep in plain attributes: the objects, and what is in tensors and containers."""
    tables = [(owner.__dict__, dict(owner.__dict__)) for owner in owners]
    values = (v for _, before in tables for name, v in before.items() if name not in _OF_EVERY_MODULE)
    restores = [restore for value in values if (restore := contents.restore_of(value))]
    try:
        yield
    finally:
        for table, before in tables:
            for name in table.keys() - before.keys():
                del table[name]
            table.update(before)
        for restore in restores:
            restore()


@contextmanager
def _restored_code(model: nn.Module, contents: "_Contents") -> Iterator[None]:
    """Restore what the model's code keeps outside its modules."""
    restores = restores_of_code(model, contents.restore_of)
    try:
        yield
    finally:
        for restore in restores:
            restore()


class _Contents:
    """Makes what restores the content of values, of each once.

    Objects are looked into whose classes are of the packages that the model's are of. Others, such as a trainer that a
    module refers to, are no part of it.
    """

    def __init__(self, model: nn.Module, others: Iterable[object]) -> None:
        self.tensors: list[Tensor] = []
        """Those found, which are restored where a pass writes to them."""
        self._packages = {_package(cls) for owner in (*model.modules(), *others) for cls in type(owner).__mro__}
        self._packages -= {"torch", "lightning", "pytorch_lightning", *sys.stdlib_module_names}
        self._packages |= {"__main__", "transformers"}  # whose caches of keys and values are in other people's modules
        self._seen: dict[int, object] = {}  # held, so that no other value gets the same id

    def restore_of(self, value: Any, depth: int = _DEPTH) -> Callable[[], object] | None:
        """What restores a value's content; None for what cannot change or is of another kind."""
        if value is None or isinstance(value, (bool, int, float, str, type)) or id(value) in self._seen:
            return None
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors += [] if isinstance(value, nn.Parameter) else [value]
            return None
        if isinstance(value, torch.Generator):
            return partial(value.set_state, value.get_state())
        if isinstance(value, random.Random):
            return partial(value.setstate, value.getstate())
        if hasattr(value, "bit_generator"):  # NumPy's
            return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        if not isinstance(value, tuple) and type(value) not in _CONTAINERS:
            own = vars(value) if hasattr(value, "__dict__") and not callable(value) else None
            value = own if isinstance(own, dict) and _package(type(value)) in self._packages else None
        if value is None:
            return None
        items = (value.values() if isinstance(value, dict) else value) if depth and len(value) <= _SEARCHED else ()
        inner = [restore for each in [*items] if (restore := self.restore_of(each, depth - 1))]
        held = value if isinstance(value, tuple) else value.copy()
        return partial(_refill, value, held, inner) if inner or not isinstance(value, tuple) else None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _can_be_written(tensor: Tensor) -> bool:
    overlaps = tensor.layout == torch.strided and 0 in tensor.stride() and tensor.numel() > 1  # made by `expand`
    return tensor.layout == torch.strided and not overlaps and not tensor.is_meta and not tensor.is_inference()


def _write_back(tensor: Tensor, content: Tensor) -> None:
    # Without a comparison, for which a GPU would have to be waited for. By `data`, so that a backward pass that still
    # needs the tensor does not take it for changed.
    if tensor.shape == content.shape:
        tensor.data.copy_(content)


def _refill(value: Any, held: Any, inner: list[Callable[[], object]]) -> None:
    if not isinstance(value, tuple):
        value.clear()
    if isinstance(value, set | dict):
        value.update(held)
    elif not isinstance(value, tuple):
        value.extend(held)
    for restore in inner:
        restore()

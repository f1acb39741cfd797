"""Running the user's model so that it is afterwards as it was before."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from predictor.layers.code_state import restores_of_code, users_hooks
from predictor.layers.contents import Contents
from predictor.layers.hook_tables import restored_hooks
from predictor.layers.tensors import WithoutMemory, number_of, tensors_in

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
    numbers, tensors, lists, dicts and `functools.lru_cache`. Networks and other objects that the model, its code or
    `others` hold are restored like the model; they keep their modes. Nothing waits for a GPU.

    The caller gives the pass copies of the inputs (`predictor.layers.tensors.copied`). Forward hooks run, since many
    are part of a model (weight norm, pruning, adapters). What they keep is brought back like what the model's code
    keeps, so that a list of outputs holds those of the training alone.

    Args:
        model: the model.
        as_in_training: have the modules in the modes that the training has them in, and record gradients for all
            parameters, but nothing that a backward pass needs.
        gradients: record gradients in evaluation mode, for `torch.autograd.grad`, which leaves `.grad` alone. Random
            generators go on from where they are.
        others: further objects that are restored with all that they hold, such as a data loader, or a function that
            computes a loss.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"}
    with ExitStack() as stack:
        stack.callback(_isolated.reset, _isolated.set(True))
        stack.callback(_shown.reset, _shown.set(False))
        stack.enter_context(_restored_modes(model, evaluation=not as_in_training))
        contents = stack.enter_context(_restored_contents(model, others))
        stack.enter_context(restored_hooks(contents.modules))
        stack.enter_context(_restored_buffers(contents.modules))
        stack.enter_context(_restored_random_state(devices, seeded=not gradients))
        stack.enter_context(_eager_part_by_part())
        stack.enter_context(_no_autocast_cache())
        recording = torch.enable_grad() if gradients else torch.no_grad()
        stack.enter_context(_all_requiring_gradients(model) if as_in_training else recording)
        deferred = [b for b in _all_of(module._buffers for module in contents.modules) if isinstance(b, WithoutMemory)]
        stack.enter_context(_restored_parameters(contents.modules, [*contents.tensors, *deferred]))
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
def _restored_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    tables = [(module._buffers, dict(module._buffers)) for module in modules]
    buffers = [buffer for buffer in _all_of(before for _, before in tables) if not isinstance(buffer, WithoutMemory)]
    contents = [(buffer, buffer.detach().clone()) for buffer in buffers if _can_be_written(buffer)]
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
def _restored_parameters(modules: Iterable[nn.Module], others: Iterable[Tensor]) -> Iterator[None]:
    """Restore parameters and others that a pass writes to, as one with a momentum encoder does. Only those are copied.

    Args:
        modules: those whose parameters they are.
        others: tensors that are no parameters.
    """
    tables = [(module._parameters, dict(module._parameters)) for module in modules]
    # FSDP's and meta tensors have no memory here that could be compared.
    plain = [p for p in _all_of(own for _, own in tables) if type(p.data) is Tensor and _can_be_written(p)]
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


@contextmanager
def _restored_contents(model: nn.Module, others: Iterable[object]) -> Iterator[Contents]:
    """Restore what modules and others hold, and what the model's code keeps outside its modules."""
    contents = Contents(model, [*others, *users_hooks(model)])
    for each in (model, *others):
        contents.add(each, attribute=True, given=True)
    code = contents.code()
    restores = restores_of_code(model, contents.add, code)
    for _ in code:  # of more functions than are followed the values are looked at all the same
        pass
    try:
        yield contents
    finally:
        for restore in (*contents.restores, *restores):
            restore()


def _all_of(tables: Iterable[dict[str, Any]]) -> Iterable[Any]:
    """The tensors in tables of modules, each once."""
    return {id(tensor): tensor for table in tables for tensor in table.values() if tensor is not None}.values()


def _can_be_written(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_inference():
        return False
    return 0 not in tensor.stride() or tensor.numel() <= 1  # made by `expand`


def _write_back(tensor: Tensor, content: Tensor) -> None:
    # Without a comparison, for which a GPU would have to be waited for. By `data`, so that a backward pass that still
    # needs the tensor does not take it for changed.
    if tensor.shape == content.shape:
        tensor.data.copy_(content)

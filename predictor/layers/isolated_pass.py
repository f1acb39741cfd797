"""Running the user's model so that it is afterwards as it was before."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from predictor.layers.hook_tables import restored_hooks


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """A context in which a pass of the model leaves no trace.

    Inside, the model is in evaluation mode, records no gradients and runs eagerly, part by part. Afterwards these are
    what they were: every module's mode, every buffer (the object and its content), what modules keep in plain
    attributes, and the state of the random generators (Python's, NumPy's, torch's on the CPU and on the model's
    devices). So are parameters, unless the model's own `forward` writes to them, as one with a momentum encoder may.
    The caller gives the pass copies of the inputs (`predictor.layers.tensors.copied`).
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"}
    with ExitStack() as stack:
        stack.enter_context(restored_hooks(model))
        stack.enter_context(_restored_modes(model))
        stack.enter_context(_restored_attributes(model))
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_restored_random_state(devices))
        stack.enter_context(_eager_part_by_part())
        stack.enter_context(_no_autocast_cache())
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _restored_modes(model: nn.Module) -> Iterator[None]:
    # Not by eval() and train(): they may be overridden and do more than set a flag (adapters merge their weights).
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for table, before in tables:
            if {name: id(buffer) for name, buffer in table.items()} != {n: id(b) for n, b in before.items()}:
                table.clear()
                table.update(before)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


@contextmanager
def _restored_random_state(devices: set[torch.device]) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu"}:
            indices = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
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


@contextmanager
def _restored_attributes(model: nn.Module) -> Iterator[None]:
    """Restore what modules keep in plain attributes: the objects, and what is in tensors and containers."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    values = (v for _, before in modules for name, v in before.items() if name not in _OF_EVERY_MODULE)
    restores = [restore for value in values if (restore := _restore_of(value))]
    try:
        yield
    finally:
        for module, before in modules:
            for name in module.__dict__.keys() - before.keys():
                del module.__dict__[name]
            module.__dict__.update(before)
        for restore in restores:
            restore()


def _restore_of(value: Any, depth: int = 2) -> Callable[[], object] | None:
    """What restores the content of an attribute's value; None for what cannot change or is of another kind."""
    if isinstance(value, Tensor):
        fit = value.layout == torch.strided and not value.is_meta and not isinstance(value, nn.Parameter)
        return partial(_write_back, value, value.detach().clone()) if fit else None
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value) not in (list, deque, set, dict):
        return None
    held = value.copy()
    items = (value.values() if isinstance(value, dict) else value) if depth and len(value) <= _SEARCHED else ()
    inner = [restore for each in items if (restore := _restore_of(each, depth - 1))]
    return partial(_refill, value, held, inner)


def _write_back(tensor: Tensor, content: Tensor) -> None:
    if tensor.shape == content.shape and not torch.equal(tensor, content):
        with torch.no_grad():
            tensor.copy_(content)


def _refill(value: Any, held: Any, inner: list[Callable[[], object]]) -> None:
    value.clear()
    if isinstance(value, set | dict):
        value.update(held)
    else:
        value.extend(held)
    for restore in inner:
        restore()

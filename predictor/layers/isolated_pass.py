"""Running somebody's model so that it is afterwards as it was before."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In here the model is in evaluation mode, records no gradients and runs eagerly, part by part.

    Afterwards every module's mode, every buffer (the object and what is in it) and the state of the random generators
    (Python's, NumPy's, torch's on the CPU and on the model's devices) are what they were. Parameters are too, unless
    the model's own `forward` writes to them, as one with a momentum encoder may.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"}
    with ExitStack() as stack:
        stack.enter_context(_modes_kept(model))
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(_random_kept(devices))
        stack.enter_context(_part_by_part())
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    # Not by eval() and train(): they may be overridden, and do more than set a flag (adapters merge their weights).
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
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
def _random_kept(devices: set[torch.device]) -> Iterator[None]:
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
def _part_by_part() -> Iterator[None]:
    """Neither torch.compile nor attention's fused form, which calls no part of the layer that it stands for."""
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

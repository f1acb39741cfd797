"""One process in DDP and in FSDP2, over NCCL on a GPU and gloo on a CPU."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evaluate.gpu.checks import CheckFailed, CheckSkipped
from evaluate.gpu.loops import STEPS, Watch, policy_of_schedule
from evaluate.gpu.subject import Loop, batches, network

_TOLERANCE = 1e-3


def ddp(device: torch.device) -> str:
    """The losses of a training without DDP."""
    ids = [device.index or 0] if device.type == "cuda" else None
    with _group(device) as backend:
        return f"{backend}: {_compared(device, lambda model: DistributedDataParallel(model, device_ids=ids))}"


def fsdp2(device: torch.device) -> str:
    """The losses of a training that is not sharded."""
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise CheckSkipped(f"FSDP2 of PyTorch {torch.__version__} does not run on a CPU")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(device.type, (1,))
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)  # in place
        return model

    with _group(device) as backend:
        return f"{backend}: {_compared(device, shard)}"


@contextmanager
def _group(device: torch.device) -> Iterator[str]:
    """A group of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        raise CheckSkipped(f"this PyTorch has no {backend}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield backend
        finally:
            dist.destroy_process_group()


def _compared(device: torch.device, wrap: Callable[[nn.Module], nn.Module]) -> str:
    alone, _ = _losses(device, lambda model: model)
    wrapped, figures = _losses(device, wrap)
    difference = max(abs(one - other) for one, other in zip(alone, wrapped, strict=True))
    if not difference <= _TOLERANCE:
        raise CheckFailed(f"a loss differs from that of the model alone by {difference:.2g}: {figures}")
    return f"{figures}, losses as without to {difference:.0e}"


def _losses(device: torch.device, wrap: Callable[[nn.Module], nn.Module]) -> tuple[list[float], str]:
    model = network().to(device)
    adamw = partial(torch.optim.AdamW, lr=0.01)
    watch = Watch(Loop(model, adamw, policy_of_schedule(), total_steps=STEPS, wrapped=wrap(model)))
    ready = batches(device, 8)
    for step in range(STEPS):
        watch.step(*ready[step % len(ready)])
    return watch.losses, watch.figures()

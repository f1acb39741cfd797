"""Compiled models give the losses of eager mode while layers freeze and train again."""

from functools import partial
from typing import Any

import torch

from evaluate.gpu.checks import CheckFailed, CheckSkipped
from evaluate.gpu.loops import STEPS, Watch, policy_of_schedule
from evaluate.gpu.subject import Loop, batches, network

_TOLERANCE = 0.05
"""The difference that a loss may have after 40 steps of other kernels."""


def default(device: torch.device) -> str:
    """torch.compile as it comes; on a CPU, where its kernels take minutes to compile, without these."""
    return _compared(device, {"mode": "default"} if device.type == "cuda" else {"backend": "aot_eager"})


def reduce_overhead(device: torch.device) -> str:
    """With captured CUDA graphs, which are captured anew when the frozen set changes."""
    if device.type != "cuda":
        raise CheckSkipped("CUDA graphs need a GPU")
    return _compared(device, {"mode": "reduce-overhead"})


def _compared(device: torch.device, options: dict[str, Any]) -> str:
    eager, _ = _losses(device, None)
    found, figures = _losses(device, options)
    difference = max(abs(one - other) for one, other in zip(eager, found, strict=True))
    if not difference <= _TOLERANCE:
        raise CheckFailed(f"a loss differs from eager mode's by {difference:.2g}: {figures}")
    how = ", ".join(options.values())
    return f"{how}: {figures}, losses as in eager mode to {difference:.0e}"


def _losses(device: torch.device, options: dict[str, Any] | None) -> tuple[list[float], str]:
    """The loss of each step, checked as `Watch` does, and the figures. options: torch.compile's; None: eager mode."""
    model = network().to(device)
    wrapped: Any = None if options is None else torch.compile(model, **options)
    adamw = partial(torch.optim.AdamW, lr=0.01)
    watch = Watch(Loop(model, adamw, policy_of_schedule(), total_steps=STEPS, wrapped=wrapped))
    ready = batches(device, 8)
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        watch.step(*ready[step % len(ready)])
    return watch.losses, watch.figures()

"""Freezing, unfreezing and resuming under mixed precision and with each kind of optimizer."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evaluate.gpu.checks import CheckFailed, CheckSkipped
from evaluate.gpu.subject import Loop, batches, network
from predictor.policies import make_policy
from predictor.policies.base import FreezePolicy

STEPS = 40
_PREFIXES = ((0.25, 0.5), (0.5, 0.25), (0.75, 0.75))
"""(progress, share of the layers): freezes half, unfreezes a part of it, freezes more."""
_RESUMED_AT = 24
"""The step after which a second loop goes on from a saved state: behind the unfreezing."""
_ROUNDING, _ROUNDING_HALF = 1e-4, 1e-2
"""By how much a weight may differ after the resumed steps where sums are taken in another order each time; the second
with autocast."""
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def amp_bf16(device: torch.device) -> str:
    """Autocast to bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise CheckSkipped("this GPU has no bfloat16")
    return follow_schedule(device, _adamw(), dtype=torch.bfloat16)


def amp_fp16(device: torch.device) -> str:
    """Autocast to float16. The scaler starts so high that it skips the first steps."""
    scaler = partial(torch.amp.GradScaler, device.type, init_scale=2.0**32, backoff_factor=0.25)
    return follow_schedule(device, _adamw(), dtype=torch.float16, make_scaler=scaler)


def fused(device: torch.device) -> str:
    """The optimizers whose step is one kernel."""
    return _both(device, fused=True)


def foreach(device: torch.device) -> str:
    """The optimizers that work on lists of tensors."""
    return _both(device, foreach=True)


def capturable(device: torch.device) -> str:
    """Adam's form for captured graphs, whose step count is on the device."""
    return f"AdamW: {follow_schedule(device, _adamw(capturable=True))}"


def _both(device: torch.device, **options: Any) -> str:
    sgd: MakeOptimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, **options)
    return f"SGD: {follow_schedule(device, sgd)}; AdamW: {follow_schedule(device, _adamw(**options))}"


def _adamw(**options: Any) -> MakeOptimizer:
    return partial(torch.optim.AdamW, lr=0.01, **options)


def follow_schedule(
    device: torch.device,
    make_optimizer: MakeOptimizer,
    dtype: torch.dtype | None = None,
    make_scaler: Callable[[], torch.amp.GradScaler] | None = None,
) -> str:
    """Train under a schedule that freezes, unfreezes and freezes; check every step, and a resumed training.

    Args:
        device: Where.
        make_optimizer: Makes the optimizer.
        dtype: Of autocast.
        make_scaler: Makes the loss's scaler.

    Returns:
        The figures. Raises CheckFailed where a frozen layer moves, one that trains does not, the loss does not fall, or
        the resumed training ends elsewhere.
    """

    def loop() -> Loop:
        scaler = make_scaler() if make_scaler else None
        model, policy = network().to(device), policy_of_schedule()
        return Loop(model, make_optimizer, policy, total_steps=STEPS, dtype=dtype, scaler=scaler)

    ready = batches(device, 8)
    whole, saved = loop(), b""
    watch = Watch(whole)
    for step in range(STEPS):
        watch.step(*ready[step % len(ready)])
        if step + 1 == _RESUMED_AT:
            saved = whole.saved()
    resumed = loop()
    resumed.load(saved)
    for step in range(_RESUMED_AT, STEPS):
        resumed.step(*ready[step % len(ready)])
    difference = _largest_difference(whole.model, resumed.model)
    if not difference <= (0.0 if device.type == "cpu" else _ROUNDING if dtype is None else _ROUNDING_HALF):
        raise CheckFailed(f"a resumed training ends elsewhere: a weight differs by {difference:.1e}")
    if resumed.controller.frozen != whole.controller.frozen:
        raise CheckFailed(f"a resumed training has {sorted(resumed.controller.frozen)} frozen")
    return f"{watch.figures()}, resumed to {difference:.0e}"


class Watch:
    """Takes the steps of a loop, and checks that what is frozen stands still and that the rest moves."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.losses: list[float] = []
        self.skipped = 0
        """Steps that the scaler left out."""

    def step(self, x: Tensor, labels: Tensor) -> None:
        """Take a step. Raises CheckFailed."""
        loop = self._loop
        before = copy.deepcopy(loop.model.state_dict())
        frozen, scale = loop.controller.frozen, loop.scaler.get_scale()
        self.losses.append(float(loop.step(x, labels)))
        skipped = loop.scaler.get_scale() < scale
        self.skipped += skipped
        after = loop.model.state_dict()
        for index, layer in enumerate(loop.controller.layers):
            still = all(torch.equal(before[name], after[name]) for name in _names(loop.model, layer.parameters()))
            number = len(self.losses)
            if index in frozen and not still:
                raise CheckFailed(f"step {number}: frozen layer {index} moved")
            if index not in frozen and still and not skipped:
                raise CheckFailed(f"step {number}: layer {index}, which trains, did not move")

    def figures(self) -> str:
        """The losses. Raises CheckFailed where they did not fall."""
        first, last = (sum(part) / len(part) for part in (self.losses[:4], self.losses[-4:]))
        if not last < first:
            raise CheckFailed(f"the loss did not fall: {first:.2f} at first, {last:.2f} at last")
        skipped = f", {self.skipped} steps skipped" if self.skipped else ""
        changes = len(self._loop.controller.history)
        return f"loss {first:.2f} -> {last:.2f}, {changes} changes{skipped}"


def _names(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    wanted = {id(parameter) for parameter in parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def _largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def policy_of_schedule() -> FreezePolicy:
    """The schedule that these checks freeze by."""
    return make_policy("schedule", fronts=_PREFIXES)

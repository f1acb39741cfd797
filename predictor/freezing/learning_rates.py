"""Learning rates by layer, for any optimizer whose step is proportional to its learning rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer


@dataclass(frozen=True)
class _Kept:
    """A layer's weights before a step, and the factor for that step."""

    factor: float
    parameters: list[Tensor]
    before: list[Tensor]


class LayerRates:
    """Multiplies the steps of some layers by a factor, as their own learning rates would.

    Parameter groups stay as they are, since more of them would break schedulers and resuming. Instead a layer's
    weights are kept before the optimizer's step, and after it w = before + factor * (after - before). That is exact,
    up to rounding, where a step is proportional to the learning rate: SGD with momentum, Adam, AdamW and most others,
    weight decay included; not LBFGS, nor optimizers that choose their own rate. Weights of 16 bits round the step
    twice. A GradScaler that skips a step skips this too, or finds nothing to multiply.

    Costs a copy of those layers' weights while the optimizer steps; nothing while every factor is 1.

    layers: front to back. optimizers: those that hold their parameters. ask: the factors for the step about to begin,
    by place, where they are not 1. timed: runs what is done here, and counts the time.

    Raises UsageError during a step when a factor is negative or no number, or names a layer that does not exist.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        optimizers: Sequence[Optimizer],
        ask: Callable[[], Mapping[int, float]],
        timed: Callable[[Callable[[], None]], object],
    ) -> None:
        self._layers = layers
        self._ask = ask
        self._timed = timed
        self._kept: dict[int, list[_Kept]] = {}
        self._handles = []
        for number, optimizer in enumerate(map(innermost, optimizers)):
            own = [_held_by(optimizer, layer) for layer in layers]
            self._handles += [
                optimizer.register_step_pre_hook(partial(self._before_step, number, own)),
                optimizer.register_step_post_hook(partial(self._after_step, number)),
            ]

    def close(self) -> None:
        """Leave the optimizers alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept = {}

    def _before_step(self, number: int, own: list[list[nn.Parameter]], *_: Any) -> None:
        self._timed(partial(self._keep, number, own))

    def _after_step(self, number: int, *_: Any) -> None:
        self._timed(partial(self._scale, number))

    @torch.no_grad()
    def _keep(self, number: int, own: list[list[nn.Parameter]]) -> None:
        # Overwrites what a step left that raised an error half-way. Gradients are no sign of which weights will move:
        # a closure makes them during the step.
        self._kept[number] = []
        for place, factor in self._ask().items():
            _refuse_unfit(place, factor, len(self._layers))
            moving = [_here(parameter) for parameter in own[place] if parameter.requires_grad]
            if factor != 1 and moving:
                self._kept[number].append(_Kept(factor, moving, [weight.clone() for weight in moving]))

    @torch.no_grad()
    def _scale(self, number: int) -> None:
        for kept in self._kept.pop(number, []):
            # lerp, since it gives back both ends exactly.
            scaled = torch._foreach_lerp(kept.before, kept.parameters, kept.factor)
            torch._foreach_copy_(kept.parameters, scaled)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, where Accelerate has put its own around it: only the inner one calls hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _here(parameter: nn.Parameter) -> Tensor:
    """The parameter, or this process's piece of it where FSDP2 has it in pieces."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _held_by(optimizer: Optimizer, layer: Layer) -> list[nn.Parameter]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in layer.parameters() if id(parameter) in held]


def _refuse_unfit(place: int, factor: float, layers: int) -> None:
    if not 0 <= place < layers:
        raise UsageError(f"a learning rate for layer {place} of {layers}: places run from 0 to one less")
    if not isfinite(factor) or factor < 0:
        raise UsageError(f"a learning rate of {factor} times the training's for layer {place}: give a number from 0")

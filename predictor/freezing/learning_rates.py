"""Learning rates by layer, for any optimizer whose step is proportional to its learning rate."""

import warnings
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
class _Before:
    """A layer's weights before a step, and the factor of that step."""

    factor: float
    parameters: list[Tensor]
    weights: list[Tensor]


class LayerRates:
    """Multiplies the optimizer steps of some layers by a factor, as their own learning rates would.

    Parameter groups stay as they are, since more of them would break schedulers and resuming. Instead a layer's
    weights are copied before the optimizer's step, and after it w = before + factor * (after - before). That is exact,
    up to rounding, where a step is proportional to the learning rate: SGD with momentum, Adam, AdamW and most others,
    weight decay included. It is not for LBFGS, nor for optimizers that choose their own rate. Weights of 16 bits round
    the step twice. Where a GradScaler skips a step, nothing is multiplied.

    An optimizer whose `step` is not called by itself, as where one for sharpness-aware minimization (SAM) steps another
    inside it, cannot be followed; `check` warns of it.

    The cost is a copy of those layers' weights during the optimizer's step, and nothing while every factor is 1.

    Args:
        layers: front to back.
        optimizers: those that hold the layers' parameters.
        ask: returns the factors of the step that is about to begin, by layer index, where they are not 1.
        timed: runs what is done here and counts the time.

    Raises:
        UsageError: during a step, when a factor is negative or no number, or names a layer that does not exist.
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
        self._before: dict[int, list[_Before]] = {}
        self._called = False  # by an optimizer's step
        self._versions: list[int] = []
        self._handles = []
        for number, optimizer in enumerate(map(innermost, optimizers)):
            self._handles += [
                optimizer.register_step_pre_hook(partial(self._before_step, number, _Held(optimizer, layers))),
                optimizer.register_step_post_hook(partial(self._after_step, number)),
            ]

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before = {}

    def check(self) -> None:
        """Warn, once, where weights have moved since the last call of this and no optimizer's step was seen."""
        if self._called:
            return
        # By more than steps: a GradScaler may have skipped all so far.
        versions = [parameter._version for layer in self._layers for parameter in layer.parameters()]
        moved = bool(self._versions) and versions != self._versions
        self._versions = versions
        if moved:
            self._called = True
            warnings.warn(
                "weights move and no optimizer given to the controller is stepped, so that the policy's learning rates "
                "are not applied: one of them may step another inside it, as for sharpness-aware minimization (SAM). "
                "Give the controller that one, FreezeController(model, optimizer.base_optimizer, ...)",
                stacklevel=5,
            )

    def _before_step(self, number: int, held: "_Held", *_: Any) -> None:
        self._called = True
        self._timed(partial(self._copy, number, held))

    def _after_step(self, number: int, *_: Any) -> None:
        self._timed(partial(self._scale, number))

    @torch.no_grad()
    def _copy(self, number: int, held: "_Held") -> None:
        # Overwrites what a step left that raised an error half-way. Gradients are no sign of which weights will move:
        # a closure makes them during the step.
        self._before[number] = []
        held_L = held.by_layer()
        for index, factor in self._ask().items():
            _check_factor(index, factor, len(self._layers))
            moving = [_local(parameter) for parameter in held_L[index] if parameter.requires_grad]
            if factor != 1 and moving:
                self._before[number].append(_Before(factor, moving, [weight.clone() for weight in moving]))

    @torch.no_grad()
    def _scale(self, number: int) -> None:
        for before in self._before.pop(number, []):
            for parameter, weight in zip(before.parameters, before.weights, strict=True):
                # lerp, since it gives back both ends exactly.
                parameter.copy_(weight.lerp(parameter, before.factor))


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, where Accelerate has wrapped its own around it: only the inner one calls hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _local(parameter: nn.Parameter) -> Tensor:
    """The parameter, or this process's piece of it under FSDP2."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class _Held:
    """The parameters that an optimizer holds, by layer. Groups may be added while it trains."""

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        self._optimizer, self._layers = optimizer, layers
        self._sizes: list[int] = []
        self._held_L: list[list[nn.Parameter]] = []

    def by_layer(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer, front to back."""
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        if sizes != self._sizes:
            held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
            self._sizes = sizes
            self._held_L = [[p for p in layer.parameters() if id(p) in held] for layer in self._layers]
        return self._held_L


def _check_factor(index: int, factor: float, layers: int) -> None:
    if not 0 <= index < layers:
        raise UsageError(f"a learning rate for layer {index} of {layers}: indices run from 0 to one less")
    if not isfinite(factor) or factor < 0:
        raise UsageError(f"a learning rate of {factor} times the training's for layer {index}: give a number from 0")

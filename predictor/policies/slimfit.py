"""SlimFit: the layers that the last step changed least are frozen for the next steps."""

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import LastStep, read, real_of

_LEAST = 1e-8
"""Replaces a weight of zero in a divisor."""


class SlimFitPolicy(FreezePolicy):
    """Freezes the share of the layers whose weights changed least, relative to their size.

    Paper: SlimFit (Ardakani et al., 2023, arXiv 2305.18513), which saves memory in fine-tuning transformers.

    Rule: the share p of all layers with the least mean |dw / w| over a step is frozen. The choice is made again every
    few steps.

    Signal: weights.

    Differs: whole layers rather than single tensors, chosen every few steps rather than at each. A frozen layer does
    not move: in our reading it keeps its last value, so that it trains again once the active layers have become as
    slow. Only weights of two or more dimensions are measured, where a layer has any, since a bias that starts from zero
    would outweigh all else. The paper's quantization is left out. Steps are not divided by the learning rate, so that
    what froze under a warm-up stays frozen until the rate is as small again. An unfrozen layer starts with fresh
    optimizer state.

    Cost: a copy of the weights once in `every` steps, and one mean a layer.

    Args:
        share: the share of the layers that are frozen, rounded to whole layers.
        every: optimizer steps between choices.
    """

    unfreezes = True

    def __init__(self, share: float = 0.5, every: int = 10) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"share={share}: give a share of the layers, from 0 to 1")
        if every < 1:
            raise UsageError(f"every={every}: give a number of optimizer steps, from 1")
        self.share = share
        self.every = every

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Start with layers whose movement is unknown."""
        self._last_step = LastStep(layers)
        self._distances = [inf] * len(layers)

    def observe(self, view: View) -> None:
        """Measure the step before a choice."""
        if self._last_step.kept:
            self._measure(view)
            self._last_step.drop()
        self._keep_if_next(view.step)

    def decide(self, view: View) -> frozenset[int]:
        """The share of the layers that moves least."""
        if view.step == 0:
            self._keep_if_next(0)
        if inf in self._distances:
            return view.frozen
        slowest_first = sorted(range(len(view.layers)), key=lambda index: (self._distances[index], index))
        return frozenset(slowest_first[: round(self.share * len(view.layers))])

    def state_dict(self) -> dict[str, Any]:
        """Each layer's last movement, and the weights before a step that will be measured."""
        return {"distances": list(self._distances), **self._last_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._distances = list(state["distances"])
        self._last_step.load_state_dict(state)

    def close(self) -> None:
        """Drop the copied weights."""
        self._last_step.drop()

    def _keep_if_next(self, step: int) -> None:
        if (step + 1) % self.every == 0:
            self._last_step.keep()

    @torch.no_grad()
    def _measure(self, view: View) -> None:
        if view.active:
            values = read([self._distance(index) for index in view.active])
            if any(values):  # otherwise the step was skipped, or had a learning rate of zero
                for index, value in zip(view.active, values, strict=True):
                    self._distances[index] = value

    def _distance(self, index: int) -> Tensor:
        """Mean |dw / w| over a layer's weights."""
        pairs = list(zip(self._last_step.moved(index), self._last_step.before(index), strict=True))
        pairs = [pair for pair in pairs if pair[0].dim() >= 2] or pairs
        ratios = [(real_of(moved) / real_of(before).abs().clamp_min(_LEAST)).abs().sum() for moved, before in pairs]
        return torch.stack(ratios).sum() / sum(moved.numel() for moved, _ in pairs)

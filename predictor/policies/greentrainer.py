"""GreenTrainer: the layers that lower the loss most train, as many as a budget of FLOPs allows."""

from collections.abc import Sequence
from math import ceil, isfinite
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import LastStep, read, real_of, steps_into_interval

_UNITS = 10_000
"""The units that the budget is cut into for the search."""
_PATIENCE = 10
"""Steps of a round within which one has to be measured. Otherwise all layers train until the next round."""


class GreenTrainerPolicy(FreezePolicy):
    """Trains the most important layers whose step fits a budget of FLOPs, chosen again in each round.

    Paper: GreenTrainer (Huang et al., ICLR 2024, arXiv 2309.13192), for fine-tuning language models.

    Rule: a layer's importance is the fall of the loss that its last step promises, -sum(g dw). The chosen set has the
    greatest sum of importance among those whose step costs at most `share` of a full one's FLOPs. Weights' gradients
    cost where a layer trains, and inputs' gradients from the head down to the first layer that trains. The choice is
    solved by dynamic programming, as a knapsack for each first layer.

    Signal: gradients and weights.

    Differs: whole layers rather than single tensors. Our reading of when to measure is one step in which all layers
    train, at the start of each round. Nothing freezes where FLOPs cannot be counted. An unfrozen layer starts with
    fresh optimizer state in just the step that is measured: under Adam it looks more important than one that has been
    training.

    Cost: one full step and one copy of the weights a round, and a search of milliseconds.

    Args:
        share: the share of a full step's FLOPs, above 0 and at most 1. A forward pass alone takes about a third. Where
            not even one layer fits, all are frozen.
        rounds: how often the choice is made over the training.
    """

    wants_flops = True
    unfreezes = True

    def __init__(self, share: float = 0.7, rounds: int = 10) -> None:
        if not 0 < share <= 1:
            raise UsageError(f"share={share}: give a share of a full step's FLOPs, above 0 and at most 1")
        if rounds < 1:
            raise UsageError(f"rounds={rounds}: give a number of choices, from 1")
        self.share = share
        self.rounds = rounds
        self._importance: list[float] = []

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Prepare the measurement of a step."""
        self._last_step = LastStep(layers)

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Measure the step in which all layers train."""
        if self._last_step.kept and self._into_round(view) > _PATIENCE:
            self._last_step.drop()
        elif self._last_step.kept:
            importance = self._measure(view)
            # Where nothing moved, as at a learning rate of zero or where a GradScaler skipped the step, the next one
            # is measured.
            if any(importance) and all(map(isfinite, importance)):
                self._importance = importance
                self._last_step.drop()
            else:
                self._last_step.keep()

    def due(self, step: int, total_steps: int) -> bool:
        """In the first steps of each round."""
        return steps_into_interval(step, total_steps, self.rounds) <= _PATIENCE

    def decide(self, view: View) -> frozenset[int]:
        """Nothing at the start of a round; after one step all but the chosen layers."""
        if self._into_round(view) == 0 and view.step < view.total_steps:
            self._last_step.keep()
            self._importance = []
            return frozenset()
        if not self._importance or view.flops is None:
            return view.frozen
        chosen = most_important(self._importance, view.flops, self.share)
        self._importance = []
        return frozenset(range(len(view.layers))) - chosen

    def state_dict(self) -> dict[str, Any]:
        """The weights before a step that will be measured, and an importance that is not used yet."""
        return {"importance": list(self._importance), **self._last_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._importance = list(state["importance"])
        self._last_step.load_state_dict(state)

    def close(self) -> None:
        """Drop the copied weights."""
        self._last_step.drop()

    def _into_round(self, view: View) -> int:
        return steps_into_interval(view.step, view.total_steps, self.rounds)

    def _measure(self, view: View) -> list[float]:
        """-sum(g dw) of every layer."""
        return read([self._loss_decrease(index, layer) for index, layer in enumerate(view.layers)])

    def _loss_decrease(self, index: int, layer: Layer) -> torch.Tensor:
        pairs = zip(layer.parameters(), self._last_step.moved(index), strict=True)
        products = [-(real_of(p.grad) * real_of(moved)).sum() for p, moved in pairs if p.grad is not None]
        return torch.stack(products).sum() if products else torch.zeros((), device=next(layer.parameters()).device)


def most_important(importance_L: Sequence[float], flops: LayerFlops, share: float) -> frozenset[int]:
    """The layers to train: the greatest sum of importance among sets whose step costs at most `share` of a full one.

    Costs are rounded up to ten-thousandths of what the budget leaves beyond a step with all layers frozen. So the
    budget is kept, and a set that fits to the last FLOP may be missed. Layers of no importance or less are left out.
    """
    layers = len(importance_L)
    every_layer = frozenset(range(layers))
    least, full = flops.step(every_layer), flops.step(frozenset())
    budget = share * full - least
    if budget <= 0:
        return frozenset()
    useful = frozenset(index for index in every_layer if importance_L[index] > 0)
    if flops.step(every_layer - useful) - least <= budget:
        return useful
    unit = budget / _UNITS
    # What a layer costs as the first that trains, and what it costs behind one that trains already.
    first_L = [ceil((flops.step(every_layer - {index}) - least) / unit) for index in range(layers)]
    more_L = [ceil((full - flops.step(frozenset({index}))) / unit) for index in range(layers)]
    return _fill(importance_L, first_L, more_L)


def _fill(importance_L: Sequence[float], first_L: Sequence[int], more_L: Sequence[int]) -> frozenset[int]:
    """The knapsack of `_UNITS` units, for each first layer that trains, back to front."""
    layers = len(importance_L)
    best_U = np.zeros(_UNITS + 1)  # by the units to spend: the greatest importance of layers behind this one
    taken_LU = np.zeros((layers, _UNITS + 1), dtype=bool)
    greatest, first, left = 0.0, layers, 0
    for index in reversed(range(layers)):
        rest = _UNITS - first_L[index]
        if rest >= 0 and importance_L[index] + best_U[rest] > greatest:
            greatest, first, left = importance_L[index] + best_U[rest], index, rest
        with_it_U = np.full(_UNITS + 1, -np.inf)
        with_it_U[more_L[index] :] = best_U[: max(_UNITS + 1 - more_L[index], 0)] + importance_L[index]
        taken_LU[index] = with_it_U > best_U
        best_U = np.maximum(best_U, with_it_U)
    chosen = {first} & set(range(layers))
    for index in range(first + 1, layers):
        if taken_LU[index, left]:
            chosen.add(index)
            left -= more_L[index]
    return frozenset(chosen)

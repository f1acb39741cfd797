"""Auto-RGN: each layer learns at a rate in proportion to its gradient over its weights."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError, unknown
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import matrices, read, real_of, steps_into_interval, whole

_CRITERIA = ("rgn", "snr")
_LEAST = 1e-8
"""Added to a variance in a divisor, as in the authors' code."""


class AutoRGNPolicy(FreezePolicy):
    """Scales each layer's learning rate by its relative gradient norm, or freezes the layers of little signal.

    Paper: Surgical Fine-Tuning (Lee et al., ICLR 2023, arXiv 2210.11466), its two automatic criteria.

    Rule: "rgn" (Auto-RGN): RGN = ||g|| / ||w||, averaged over a few batches. The layer learns at the training's rate
    times its RGN over the largest RGN. "snr" (Auto-SNR): the mean of g^2 / (var(g) + 1e-8) with the variance over the
    first dimension. Layers below `threshold` are frozen. Both are measured again in each epoch.

    Signal: gradients and weights.

    Differs: the authors weigh single tensors and measure between two epochs, on batches of which no step is taken. Here
    whole layers are weighed, by their parameters of two or more dimensions where they have any, in the first steps of
    each of `rounds` equal rounds. In these all layers train: in the first round at the training's rate, later at the
    rate from the round before. The head is no layer here, has no part in the largest RGN, and keeps the training's
    rate. The authors start with fresh optimizer state in each epoch; here the state stays, and a layer that unfreezes
    has a fresh one. Neither criterion saves compute in the paper; only "snr" can here.

    Cost: a few norms in the steps that are measured; and, for "rgn", a copy of the weights during each optimizer step.

    Args:
        criterion: "rgn" or "snr".
        threshold: the signal below which a layer is frozen under "snr".
        rounds: how often the layers are weighed; at most half as often as there are steps.
        batches: the steps that are measured in each round, at most one less than it has.
    """

    def __init__(self, criterion: str = "rgn", threshold: float = 0.95, rounds: int = 10, batches: int = 5) -> None:
        if criterion not in _CRITERIA:
            raise unknown("criterion of Auto-RGN", criterion, _CRITERIA)
        if not threshold > 0:
            raise UsageError(f"threshold={threshold}: give a signal above 0")
        for name, value in (("rounds", rounds), ("batches", batches)):
            if value < 1:
                raise UsageError(f"{name}={value}: give a number from 1")
        self.criterion = criterion
        self.threshold = threshold
        self.rounds = rounds
        self.batches = batches
        self.freezes = self.unfreezes = criterion == "snr"
        self._sums: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._layers: Sequence[Layer] = ()

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Keep the layers, and begin anew."""
        self._layers = layers
        self._sums, self._weights = {}, {}

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Measure the first steps of each round."""
        if not 0 < self._into_round(view.step, view.total_steps) <= self._measured(view.total_steps):
            return
        for index in view.active:
            value = _relative_norm(view.layers[index]) if self.criterion == "rgn" else _signal(view.layers[index])
            if value is not None:
                self._sums[index] = self._sums[index] + value if index in self._sums else value

    def due(self, step: int, total_steps: int) -> bool:
        """At the start of each round, and once it has been measured."""
        return self._into_round(step, total_steps) in (0, self._measured(total_steps))

    def decide(self, view: View) -> frozenset[int]:
        """Under "snr" the layers of little signal, and nothing while it is measured."""
        if self._into_round(view.step, view.total_steps) == 0:
            if view.step < view.total_steps:
                self._sums = {}
            return view.frozen if view.step >= view.total_steps else frozenset()
        values = dict(zip(self._sums, read(list(self._sums.values())), strict=True)) if self._sums else {}
        # Not finite where a GradScaler had to skip a step: then these steps are no evidence.
        if values and all(map(isfinite, values.values())):
            self._weights = {index: value / self._measured(view.total_steps) for index, value in values.items()}
        if self.criterion == "rgn":
            return frozenset()
        return frozenset(index for index, value in self._weights.items() if value < self.threshold)

    def rates(self, view: View) -> Mapping[int, float]:
        """Under "rgn" each layer's share of the largest weight; at first nothing."""
        largest = max(self._weights.values(), default=0.0) if self.criterion == "rgn" else 0.0
        return {index: value / largest for index, value in self._weights.items()} if largest > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        """The layers' weights, and the sums of a round that is being measured."""
        sums = {index: whole(value).to("cpu", copy=True) for index, value in self._sums.items()}
        return {"weights": dict(self._weights), "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them, each sum on its layer's device."""
        self._weights = dict(state["weights"])
        self._sums = {index: value.to(self._layers[index].own[0].device) for index, value in state["sums"].items()}

    def _into_round(self, step: int, total_steps: int) -> int:
        return steps_into_interval(step, total_steps, max(1, min(self.rounds, total_steps // 2)))

    def _measured(self, total_steps: int) -> int:
        """Steps that are measured in each round."""
        return min(self.batches, max(1, total_steps // max(1, min(self.rounds, total_steps // 2)) - 1))


def _relative_norm(layer: Layer) -> Tensor | None:
    """||g|| / ||w||; None without gradients, and for weights without numbers."""
    trained = [p for p in matrices(layer) if p.grad is not None and p.numel()]
    if not trained:
        return None
    gradient, weight = (_norm(each) for each in ([_gradient(p) for p in trained], trained))
    return gradient / weight.clamp_min(_LEAST)


def _signal(layer: Layer) -> Tensor | None:
    """The mean of g^2 / (var(g) + 1e-8) over a layer's matrices; None without gradients that have a variance."""
    found = [real_of(_gradient(p)) for p in matrices(layer) if p.grad is not None and p.numel()]
    found = [g for g in found if g.shape[0] > 1]
    if not found:
        return None
    total = torch.stack([whole((g.square() / (g.var(dim=0, keepdim=True) + _LEAST)).sum()) for g in found]).sum()
    return total / sum(g.numel() for g in found)


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [whole(torch.linalg.vector_norm(real_of(tensor))) for tensor in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm

"""AutoFreeze: layers whose summed gradient has stopped changing freeze, front to back."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import interval_ends, read

_LEAST = 1e-30
"""Replaces a gradient of zero in a divisor."""


class AutoFreezePolicy(FreezePolicy):
    """Freezes the layers in front of the first one whose gradient still changes much between intervals.

    Paper: AutoFreeze (Liu et al., 2021, arXiv 2102.01386), made for fine-tuning BERT.

    Rule: the gradients of an interval are summed, weight by weight, and D is the L1 norm of a layer's sum. eta = |D
    before - D now| / D before. With q the percentile of eta over the active layers, all layers before the first with
    eta >= q freeze. They stay frozen.

    Signal: gradients.

    Differs: "summed over the interval" is read as the sum of the gradients themselves, of which the norm is taken. The
    head is not counted. A layer without a gradient before, and with one now, counts as one that changes.

    Cost: a sum of gradients, which takes as much memory as the active layers, one addition a step, and one norm an
    interval. A checkpoint holds the sums.

    Args:
        intervals: how many equal intervals the training is cut into. The first decision falls at the end of the second.
        percentile: the percentile of eta, from 0 to 100. The larger it is, the more layers freeze at once.
    """

    def __init__(self, intervals: int = 20, percentile: float = 50.0) -> None:
        if intervals < 2:
            raise UsageError(f"intervals={intervals}: give at least two, whose gradients can be compared")
        if not 0 <= percentile <= 100:
            raise UsageError(f"percentile={percentile}: give a number from 0 to 100")
        self.intervals = intervals
        self.percentile = percentile
        self._layers: Sequence[Layer] = ()
        self._sums: dict[int, list[Tensor]] = {}
        self._before: dict[int, float] = {}

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Keep the layers."""
        self._layers = layers

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Add up the gradients of the active layers."""
        sums: list[Tensor] = []
        grads: list[Tensor] = []
        for index in view.active:
            own = list(view.layers[index].parameters())
            if index not in self._sums:
                self._sums[index] = [_zeros_like(parameter) for parameter in own]
            for total, parameter in zip(self._sums[index], own, strict=True):
                if parameter.grad is not None:
                    sums.append(total)
                    grads.append(parameter.grad)
        if sums:
            for total, gradient in zip(sums, grads, strict=True):
                total.add_(gradient)

    def due(self, step: int, total_steps: int) -> bool:
        """At the end of each interval."""
        return interval_ends(step, total_steps, self.intervals)

    def decide(self, view: View) -> frozenset[int]:
        """The frozen layers and, at the end of an interval, all before the first that still changes."""
        if not self.due(view.step, view.total_steps):
            return view.frozen
        now = self._norms(view)
        change = [
            abs(self._before[index] - now[index]) / max(self._before[index], _LEAST)
            for index in view.active
            if index in self._before and index in now
        ]
        self._sums, self._before = {}, now
        # Not finite where a GradScaler had to skip a step: then the interval is no evidence.
        comparable = len(change) == len(view.active) > 0 and all(map(isfinite, change))
        return view.frozen | self._settled(view.active, change) if comparable else view.frozen

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and the norms of the interval before."""
        return {
            "sums": {index: [total.to("cpu", copy=True) for total in sums] for index, sums in self._sums.items()},
            "before": dict(self._before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them, each on its parameter's device."""
        self._before = dict(state["before"])
        self._sums = {
            index: [
                total.to(parameter.device, copy=True)
                for total, parameter in zip(sums, self._layers[index].parameters(), strict=True)
            ]
            for index, sums in state["sums"].items()
        }

    def close(self) -> None:
        """Drop the sums."""
        self._sums = {}

    def _norms(self, view: View) -> dict[int, float]:
        """D of each active layer."""
        indices = [index for index in view.active if index in self._sums]
        if not indices:
            return {}
        norms = read([get_total_norm(self._sums[index], norm_type=1.0) for index in indices])
        return dict(zip(indices, norms, strict=True))

    def _settled(self, active: tuple[int, ...], change: list[float]) -> frozenset[int]:
        change_A = torch.tensor(change, dtype=torch.float64, device="cpu")
        limit = torch.quantile(change_A, self.percentile / 100).item()
        first = next(number for number, value in enumerate(change) if value >= limit)
        return frozenset(active[:first])


def _zeros_like(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.complex64 if parameter.is_complex() else torch.float32)

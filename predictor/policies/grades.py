"""GradES: a layer freezes once the gradient of each of its matrices hardly changes from step to step."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import matrices, read, real_of

Place = tuple[int, int]
"""A matrix: its layer's index, and its number in the layer."""


class GradESPolicy(FreezePolicy):
    """Freezes the layers whose gradients hardly change between two steps, after a grace period.

    Paper: GradES (Wen et al., 2025, arXiv 2509.01842), made for fine-tuning transformers.

    Rule: of each matrix, G_t = ||g_t - g_(t-1)||_1 over its elements. From the share `grace` of the steps on, a matrix
    with G below the threshold tau is done, and stays done. Training ends once all are (`stop = true` in a suite).

    Signal: gradients.

    Differs: the paper freezes each attention and feed-forward matrix by itself. A layer freezes here once all its
    matrices are done; those are its parameters of two or more dimensions, or all of a layer that has none. The paper
    sets tau by hand for each network, from 1e-10 to 0.025 in the authors' own examples, so no number serves several: by
    default it is a share of the mean G that the matrix had in the grace period. `tau` gives the paper's rule. The first
    version of the paper has ||g_t||_1 in place of the change. The code that was published measures how far the weights
    moved. Its defaults are tau = 1e-4 and a grace period of 0.3; its own example has 0.55. Whether gradients are
    clipped in the paper before G is measured is [unknown]; here G is that of the optimizer's gradients.

    Cost: a copy of the active layers' gradients and a norm of each matrix, in each step, and on a GPU a wait for these
    numbers. With `every` above 1, once in so many steps.

    Args:
        share: the threshold, as a share of a matrix's own G in the grace period.
        tau: the threshold, the same for all matrices; it replaces `share`.
        grace: the share of the steps in which nothing freezes.
        every: optimizer steps between two looks.
    """

    def __init__(self, share: float = 0.1, tau: float | None = None, grace: float = 0.3, every: int = 1) -> None:
        if not share > 0:
            raise UsageError(f"share={share}: give a share of the change in the grace period, above 0")
        if tau is not None and not tau > 0:
            raise UsageError(f"tau={tau}: give a threshold above 0")
        if not 0 <= grace < 1:
            raise UsageError(f"grace={grace}: give a share of the steps, from 0 to below 1")
        if every < 1:
            raise UsageError(f"every={every}: give a number of optimizer steps, from 1")
        self.share = share
        self.tau = tau
        self.grace = grace
        self.every = every

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Begin with matrices of which nothing is known."""
        self._matrices = {(index, n): p for index, layer in enumerate(layers) for n, p in enumerate(matrices(layer))}
        self._before: dict[Place, Tensor] = {}
        self._seen: dict[Place, list[float]] = {}  # in the grace period: the number of looks, and the sum of G
        self._done: set[Place] = set()

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Compare the gradients with those of the step before a look, and keep those before the next one."""
        if self._before and self.due(view.step, view.total_steps):
            self._look(view)
        gradients = self._gradients(view) if self.due(view.step + 1, view.total_steps) else {}
        self._before = {place: gradient.clone() for place, gradient in gradients.items()}

    def decide(self, view: View) -> frozenset[int]:
        """The frozen layers, and those whose matrices are all done."""
        waiting = {place[0] for place, parameter in self._matrices.items() if self._waits(place, parameter)}
        any_done = {index for index, _ in self._done}
        return view.frozen | {index for index in view.active if index in any_done and index not in waiting}

    def state_dict(self) -> dict[str, Any]:
        """The gradients before a look, what was seen in the grace period, and which matrices are done."""
        return {
            "before": [[*place, gradient.to("cpu", copy=True)] for place, gradient in self._before.items()],
            "seen": [[*place, *seen] for place, seen in self._seen.items()],
            "done": [list(place) for place in sorted(self._done)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them, each gradient on its parameter's device."""
        self._before = {
            (index, n): gradient.to(self._matrices[index, n].device, copy=True)
            for index, n, gradient in state["before"]
        }
        self._seen = {(index, n): [count, total] for index, n, count, total in state["seen"]}
        self._done = {(index, n) for index, n in state["done"]}

    def close(self) -> None:
        """Drop the copied gradients."""
        self._before = {}

    def _look(self, view: View) -> None:
        now = self._gradients(view)
        places = [place for place in self._before if place in now]
        changes = [torch.linalg.vector_norm(real_of(now[place] - self._before[place]), ord=1) for place in places]
        for place, change in zip(places, read(changes) if changes else [], strict=True):
            count, total = self._seen.get(place, [0, 0.0])
            if isfinite(change) and self.tau is None and (view.progress < self.grace or not count):
                self._seen[place] = [count + 1, total + change]
            elif view.progress >= self.grace and change < (self.tau or self.share * total / max(count, 1)):
                self._done.add(place)

    def _gradients(self, view: View) -> dict[Place, Tensor]:
        """The gradients of the active layers' matrices that are not done."""
        places = [place for place in self._matrices if place[0] not in view.frozen and place not in self._done]
        found = {place: self._matrices[place].grad for place in places}
        return {place: _dense(gradient) for place, gradient in found.items() if gradient is not None}

    def _waits(self, place: Place, parameter: Tensor) -> bool:
        return parameter.requires_grad and parameter.numel() > 0 and place not in self._done


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient

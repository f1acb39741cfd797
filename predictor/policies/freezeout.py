"""FreezeOut: each layer's learning rate falls to zero at a time of its own, front to back."""

from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.errors import UsageError, unknown
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.layer_rates import OwnRates

_POWERS = {"linear": 1, "squared": 2, "cubic": 3}


class FreezeOutPolicy(FreezePolicy):
    """Gives each layer a cosine learning rate of its own, and freezes it when that has reached zero.

    Paper: FreezeOut (Brock et al., 2017, arXiv 1706.04983).

    Rule: with t the progress and i the index of a layer among L, u_i = t0 + (1 - t0) i / L, and t_i is u_i, its square
    or its cube. The layer learns at lr_i(t) = a_i (1 + cos(pi t / t_i)) / 2 and freezes at t > t_i. a_i is a / t_i when
    scaled, so that every layer travels as far, and otherwise a.

    Signal: time.

    Differs: a layer's own rate replaces the training's schedule, warm-up included, whatever that schedule is. The head,
    which has t_i = 1, and all that is no layer follow the training's schedule. So the paper's method is this policy
    under a cosine schedule to zero. In a step whose scheduled rate is zero the layers stand still too.

    Cost: a copy of the weights during each optimizer step.

    Args:
        schedule: "linear", "squared" or "cubic".
        t0: where the first layer's time starts from, above 0 and at most 1, before it is squared or cubed.
        scaled: divide each layer's rate by its t_i.
        lr: the rate a. By default the highest of a schedule that names it (`OneCycleLR`), else the rate from which the
            optimizer started, by parameter group.
    """

    def __init__(self, schedule: str = "cubic", t0: float = 0.8, scaled: bool = True, lr: float | None = None) -> None:
        if schedule not in _POWERS:
            raise unknown("FreezeOut schedule", schedule, _POWERS)
        if not 0 < t0 <= 1:
            raise UsageError(f"t0={t0}: give a progress above 0 and at most 1")
        if lr is not None and not lr > 0:
            raise UsageError(f"lr={lr}: give a learning rate above 0")
        self.schedule = schedule
        self.t0 = t0
        self.scaled = scaled
        self.lr = lr

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Read the rate at which each layer starts."""
        self._own = OwnRates(optimizer, layers, self.lr)

    def rates(self, view: View) -> Mapping[int, float]:
        """Each layer's own rate, as a multiple of the scheduled one."""
        return self._own.factors(view.active, lambda index: self._rate(index, view))

    def decide(self, view: View) -> frozenset[int]:
        """The layers whose learning rate has reached zero."""
        count = len(view.layers)
        return frozenset(index for index in range(count) if view.progress > self._end(index, count))

    def state_dict(self) -> dict[str, Any]:
        """The rates at which the layers started."""
        return {"base": list(self._own.start_L)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load those rates: an optimizer under a schedule may no longer know them."""
        self._own.start_L = list(state["base"])

    def _end(self, index: int, layers: int) -> float:
        """The layer's t_i."""
        return float((self.t0 + (1 - self.t0) * index / layers) ** _POWERS[self.schedule])

    def _rate(self, index: int, view: View) -> float:
        end = self._end(index, len(view.layers))
        start = self._own.start_L[index] / (end if self.scaled else 1)
        return 0.5 * start * (1 + cos(pi * min(view.progress / end, 1.0)))

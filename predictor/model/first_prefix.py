"""Which prefix may freeze before the first step: what each will cost, predicted from the first batches' gradients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from predictor.errors import UsageError
from predictor.model.first_look import FirstLook

Floats = npt.NDArray[np.float64]
COST_FLOOR = 0.1
"""Percentage points that are added to a cost before its logarithm is taken: costs below are chance."""
MOST_COST = 5.0
"""Percentage points at which a cost is cut off: nobody wants to know how much more it is."""
_TINY = 1e-6
_LARGEST = 20.0
"""A logarithm beyond which every cost is too much, and its exponential may overflow."""


def features(look: FirstLook) -> dict[str, Floats]:
    """What the prefix model may see, by name: of each prefix of 1 to L layers.

    - `gradient`: the logarithm of the prefix's share of all layers' gradient, by the L1 norm of the mean gradient.
    - `share`, `agreement`: what files of earlier versions use. The logarithm of the prefix's share of the signal, which
      is that norm less the noise's (`FirstLook.signal_L`), and of its signal over its noise.
    """
    mean_F, signal_F, noise_F = (np.cumsum(each) for each in (look.mean_l1_L, look.signal_L, look.noise_l1_L))
    return {
        "gradient": _log_share(mean_F),
        "share": _log_share(signal_F),
        "agreement": np.log(signal_F / np.maximum(noise_F, _TINY) + 0.02),
    }


def _log_share(sum_F: Floats) -> Floats:
    """The logarithm of each sum over the last one. Where all are 0 nothing is known: then each counts as the whole."""
    if not sum_F[-1] > 0:
        return np.zeros(len(sum_F))
    share: Floats = np.log(np.maximum(sum_F / sum_F[-1], _TINY))
    return share


@dataclass(frozen=True)
class PrefixModel:
    """A line through the logarithm of the accuracy cost of freezing a prefix before the first step.

    Up to a few percentage points, the cost is about five of them times the prefix's share of the gradient.

    log(min(cost, MOST_COST) + COST_FLOOR) = intercept + sum of weights times `features`. Ridge regression makes it
    (`predictor.training.first_prefix`). What a prefix saves is not weighed against it: that was tried, in proportion
    and as a difference, and lost more for what it saved.
    """

    intercept: float
    weights: Mapping[str, float] = field(default_factory=dict)
    """By feature; one that is not named has none."""
    allowances: tuple[tuple[float, float], ...] = ()
    """Rising pairs: a risk in percentage points of accuracy, and the predicted cost that a prefix may have for that."""
    fewest_steps: int = 0
    """Optimizer steps of the shortest training that it is for."""
    shorter: "PrefixModel | None" = None
    """The model of trainings of fewer steps; without one no prefix may freeze there."""

    def costs(self, look: FirstLook) -> Floats:
        """cost_F: percentage points of accuracy that each prefix of 1 to L layers costs. It never falls."""
        known = features(look)
        line = self.intercept + sum(
            (weight * known[name] for name, weight in self.weights.items()), np.zeros(len(look.size_L))
        )
        cost_F: Floats = np.maximum.accumulate(np.maximum(np.exp(np.minimum(line, _LARGEST)) - COST_FLOOR, 0.0))
        return cost_F

    def allowance(self, risk: float) -> float:
        """The predicted cost that a prefix may have for a risk: linear between the known ones."""
        if not self.allowances:
            return 0.0
        risks, costs = zip(*self.allowances, strict=True)
        return float(np.interp(risk, risks, costs))

    def for_length(self, steps: int) -> "PrefixModel | None":
        """The model for a training of so many optimizer steps; None where it is shorter than any that is known."""
        if steps >= self.fewest_steps:
            return self
        return None if self.shorter is None else self.shorter.for_length(steps)

    def choose(self, look: FirstLook, steps: int, risk: float) -> int:
        """How many layers freeze before the first step.

        0 for none, as where the weights have learned nothing yet, or no model is for so short a training.

        Args:
            look: what the first batches' gradients say.
            steps: optimizer steps of the whole training.
            risk: percentage points of accuracy that may be lost.
        """
        model = self.for_length(steps)
        return 0 if model is None else min(look.learned, largest(model.costs(look), model.allowance(risk)))

    def as_dict(self) -> dict[str, Any]:
        """The model as JSON."""
        return {
            "intercept": self.intercept,
            "weights": dict(self.weights),
            "allowances": [list(pair) for pair in self.allowances],
            "fewest_steps": self.fewest_steps,
            **({} if self.shorter is None else {"shorter": self.shorter.as_dict()}),
        }

    @classmethod
    def from_dict(cls, content: Any) -> "PrefixModel":
        """The model that `as_dict` returned. Raises UsageError for content that is none."""
        try:
            inner = content.get("shorter")
            shorter = None if inner is None else cls.from_dict(inner)
            weights = {str(name): float(weight) for name, weight in content["weights"].items()}
            allowances = tuple((float(risk), float(cost)) for risk, cost in content["allowances"])
            fewest = int(content.get("fewest_steps", 0))
            model = cls(float(content["intercept"]), weights, allowances, fewest, shorter)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UsageError(f"no prefix model ({error})") from error
        numbers: Sequence[float] = [model.intercept, *weights.values(), *sum(allowances, ())]
        rising = all(one < other for (one, _), (other, _) in pairwise(allowances))
        falling = shorter is None or shorter.fewest_steps < fewest
        if not all(map(math.isfinite, numbers)) or not rising or not falling or not weights.keys() <= set(FEATURES):
            raise UsageError(f"no prefix model ({content!r:.80})")
        return model


def largest(cost_F: Floats, allowed: float) -> int:
    """How many layers the largest prefix has whose cost is allowed."""
    return int(np.searchsorted(cost_F, allowed, side="right")) if allowed > 0 else 0


FEATURES = ("gradient", "share", "agreement")
"""The names that `features` returns."""

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


def features(look: FirstLook, steps: int) -> dict[str, Floats]:
    """What the prefix model may see, by name: of each prefix of 1 to L layers, in a training of so many steps.

    - `gradient`: the logarithm of the prefix's share of all layers' gradient, by the L1 norm of the mean gradient.
    - `depth`: the logarithm of its share of the layers that have a gradient.
    - `steps`: the logarithm of the training's optimizer steps.
    - `share`, `agreement`: what files of earlier versions use. The logarithm of the prefix's share of the signal, which
      is that norm less the noise's (`FirstLook.signal_L`), and of its signal over its noise.
    """
    mean_F, signal_F, noise_F = (np.cumsum(each) for each in (look.mean_l1_L, look.signal_L, look.noise_l1_L))
    trained_F = np.cumsum([float(mean > 0) for mean in look.mean_l1_L])
    return {
        "gradient": _log_share(mean_F),
        "depth": _log_share(trained_F),
        "steps": np.full(len(mean_F), math.log(max(1, steps))),
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

    Up to a few percentage points, the cost goes with the share of the layers, and with the square root of the share of
    the gradient over the number of steps.

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
    most_steps: int | None = None
    """Those of the longest training that it was fitted to: longer ones count as such. None if it has no such limit."""
    most_early: float | None = None
    """The largest `FirstLook.early_share` with which a prefix may freeze: where it is larger, the first layers have not
    settled, and cost more than their gradient tells. None if it has no such limit."""
    shorter: "PrefixModel | None" = None
    """In files of an earlier version: the model of trainings of fewer steps. Without one no prefix may freeze there."""
    scratch: "PrefixModel | None" = None
    """The model of networks that have learned nothing yet. Without one no prefix may freeze there."""

    def costs(self, look: FirstLook, steps: int) -> Floats:
        """cost_F: percentage points of accuracy that each prefix of 1 to L layers costs. It never falls.

        Args:
            look: what the first batches' gradients say.
            steps: optimizer steps of the whole training.
        """
        known = features(look, steps if self.most_steps is None else min(steps, self.most_steps))
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

    def model_for(self, from_scratch: bool, steps: int) -> "PrefixModel | None":
        """The model for a training; None where no prefix may freeze, whatever its first batches say.

        From scratch that is also where it is longer than any that is known: what random layers lack may tell there.

        Args:
            from_scratch: whether the network has learned nothing yet.
            steps: optimizer steps of the whole training.
        """
        if not from_scratch:
            return self.for_length(steps)
        known = self.scratch
        if known is None or (known.most_steps is not None and steps > known.most_steps):
            return None
        return known.for_length(steps)

    def most(self, look: FirstLook) -> int:
        """How many layers may freeze at the most.

        None of those that have learned nothing, and none at all where the first have not settled. From scratch those
        that are of use with random weights.
        """
        if look.from_scratch:
            return look.ready
        settled = self.most_early is None or look.early_share <= self.most_early
        return look.learned if settled else 0

    def choose(self, look: FirstLook, steps: int, risk: float) -> int:
        """How many layers freeze before the first step.

        0 for none, as where the first layers have not learned or settled, or no model is for such a training: a shorter
        one than any that is known, and from scratch a longer one too.

        Args:
            look: what the first batches' gradients say.
            steps: optimizer steps of the whole training.
            risk: percentage points of accuracy that may be lost.
        """
        model = self.model_for(look.from_scratch, steps)
        return 0 if model is None else min(model.most(look), largest(model.costs(look, steps), model.allowance(risk)))

    def as_dict(self) -> dict[str, Any]:
        """The model as JSON."""
        return {
            "intercept": self.intercept,
            "weights": dict(self.weights),
            "allowances": [list(pair) for pair in self.allowances],
            "fewest_steps": self.fewest_steps,
            **({} if self.most_steps is None else {"most_steps": self.most_steps}),
            **({} if self.most_early is None else {"most_early": self.most_early}),
            **({} if self.shorter is None else {"shorter": self.shorter.as_dict()}),
            **({} if self.scratch is None else {"scratch": self.scratch.as_dict()}),
        }

    @classmethod
    def from_dict(cls, content: Any) -> "PrefixModel":
        """The model that `as_dict` returned. Raises UsageError for content that is none."""
        try:
            inner = [content.get(name) for name in ("shorter", "scratch")]
            shorter, scratch = (None if each is None else cls.from_dict(each) for each in inner)
            weights = {str(name): float(weight) for name, weight in content["weights"].items()}
            allowances = tuple((float(risk), float(cost)) for risk, cost in content["allowances"])
            fewest = int(content.get("fewest_steps", 0))
            most = None if content.get("most_steps") is None else int(content["most_steps"])
            early = None if content.get("most_early") is None else float(content["most_early"])
            model = cls(float(content["intercept"]), weights, allowances, fewest, most, early, shorter, scratch)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UsageError(f"no prefix model ({error})") from error
        numbers: Sequence[float] = [model.intercept, *weights.values(), *sum(allowances, ()), early or 0.0]
        rising = all(one < other for (one, _), (other, _) in pairwise(allowances))
        falling = shorter is None or shorter.fewest_steps < fewest
        lasting = most is None or most >= max(1, fewest)
        known = weights.keys() <= set(FEATURES)
        if not (all(map(math.isfinite, numbers)) and rising and falling and lasting and known):
            raise UsageError(f"no prefix model ({content!r:.80})")
        return model


def largest(cost_F: Floats, allowed: float) -> int:
    """How many layers the largest prefix has whose cost is allowed."""
    return int(np.searchsorted(cost_F, allowed, side="right")) if allowed > 0 else 0


FEATURES = ("gradient", "depth", "steps", "share", "agreement")
"""The names that `features` returns."""

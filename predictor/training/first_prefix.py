"""Fits the model of what a prefix costs that freezes before the first step, and what may be risked with it."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from predictor.errors import UsageError
from predictor.model.first_look import FirstLook
from predictor.model.first_prefix import COST_FLOOR, MOST_COST, PrefixModel, features, largest
from predictor.training.thresholds import RISKS

Floats = npt.NDArray[np.float64]
USED = ("gradient", "depth", "steps")
"""The features that it is fitted to: see `predictor.model.first_prefix.features`."""
_UNFITTED = PrefixModel(0.0, most_early=1.0)
"""Where the first tenth of the layers has more than its share of the gradient, nothing freezes."""
_RIDGE = 3.0
_SPENT = 0.5
"""The share of a risk that may be spent before the first step, in the mean over all families whose first layers have
learned something: those in which nothing freezes lose nothing. What freezes later takes the other half."""
_UNSURE = np.geomspace(1 / 1.5, 1.5, 5)
"""Factors by which the predictions may be off. Without them, a prefix that costs ten times what was predicted may lie
just beyond what is allowed; then families left out of the choice lost more than their risk."""
_ALLOWANCES = np.geomspace(0.01, 100, 400)


@dataclass(frozen=True, eq=False)
class FirstPrefixes:
    """The prefixes of one run: what each cost when it froze before the first step."""

    workload: str
    family: str
    look: FirstLook
    steps: int
    """Optimizer steps of its training."""
    size_F: npt.NDArray[np.int64]
    """Layers in each prefix that was tried, rising."""
    cost_F: Floats
    """Percentage points of accuracy that each of them cost."""
    step_F: Floats
    """FLOPs of a step with a frozen prefix of 0, 1, ... L layers, as shares of a full step's."""
    lost_F: Floats
    """What counts in the mean over runs for each of them: their costs, or these as they were measured, in which chance
    may be below 0 too."""


def fit_first_prefix(runs: Sequence[FirstPrefixes]) -> tuple[PrefixModel, dict[str, Any]]:
    """Fit the model to runs, all from scratch or none. Returns it and what a card says about it.

    The line is fitted to the runs in which a prefix may freeze at all (`PrefixModel.most`). What may be risked comes
    from families that it was not fitted to, each left out in turn: from scratch from the same runs, else from all whose
    first layer has learned something. Those in which nothing freezes lose nothing, and save nothing.

    Raises:
        UsageError: a prefix may freeze in the runs of fewer than two families.
    """
    scratch = all(run.look.from_scratch for run in runs)
    freezing = [run for run in runs if _UNFITTED.most(_measured(run.look))]
    families = sorted({run.family for run in freezing})
    if len(families) < 2:
        what = "layers that are of use with random weights" if scratch else "first layers that have learned and settled"
        kind = "networks" if scratch else "pretrained networks"
        raise UsageError(
            f"of {len(runs)} runs {len(freezing)}, of {len(families)} families, have {what}: a family is left out in "
            f"turn, so give {kind} of two"
        )
    line = _line(freezing)
    without = {family: _line([run for run in freezing if run.family != family]) for family in families}
    replayed = freezing if scratch else [run for run in runs if _measured(run.look).learned]
    predicted = predict_unseen(replayed, {run.family: without.get(run.family, line) for run in replayed})
    allowances = tuple((risk, _allowance(risk, predicted)) for risk in RISKS)
    model = replace(line, allowances=allowances, fewest_steps=min(run.steps for run in freezing))
    return model, _card(runs, freezing, predicted, model)


def _measured(look: FirstLook) -> FirstLook:
    """A look whose layers have all learned something, where that was not measured."""
    return look if look.evidence_L else replace(look, evidence_L=(math.inf,) * len(look.size_L))


def _line(runs: Sequence[FirstPrefixes]) -> PrefixModel:
    """A model with no allowances, by ridge regression. Every family weighs the same."""
    x_NC, y_N = _inputs(runs), _targets(runs)
    weight_N = _weights(runs)
    mean_C = np.average(x_NC, axis=0, weights=weight_N)
    scale_C = np.sqrt(np.average(np.square(x_NC - mean_C), axis=0, weights=weight_N)) + 1e-9
    z_NC = (x_NC - mean_C) / scale_C
    middle = float(np.average(y_N, weights=weight_N))
    ridge = _RIDGE / len(y_N) * np.eye(len(USED))
    slope_C = np.linalg.solve(
        (z_NC * weight_N[:, None]).T @ z_NC + ridge, (z_NC * weight_N[:, None]).T @ (y_N - middle)
    )
    slope_C /= scale_C
    return replace(
        _UNFITTED,
        intercept=middle - float(slope_C @ mean_C),
        weights=dict(zip(USED, slope_C.tolist(), strict=True)),
        most_steps=max(run.steps for run in runs),
    )


def _inputs(runs: Iterable[FirstPrefixes]) -> Floats:
    known = [(run, features(run.look, run.steps)) for run in runs]
    return np.concatenate([np.stack([each[name][run.size_F - 1] for name in USED], axis=1) for run, each in known])


def _targets(runs: Iterable[FirstPrefixes]) -> Floats:
    return np.concatenate([np.log(run.cost_F.clip(0, MOST_COST) + COST_FLOOR) for run in runs])


def _weights(runs: Sequence[FirstPrefixes]) -> Floats:
    """weight_N, of each prefix, with sum 1: families alike, and within one its runs alike."""
    count = {family: sum(run.family == family for run in runs) for family in {run.family for run in runs}}
    parts = [np.full(len(run.size_F), 1 / (len(count) * count[run.family] * len(run.size_F))) for run in runs]
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class _Predicted:
    """A run, and what a model without its family predicts of it."""

    run: FirstPrefixes
    cost_L: Floats
    """The predicted cost of the prefix up to each layer."""
    most: int
    """How many layers may freeze at the most."""

    def freezes(self, allowed: float) -> int:
        """How many layers freeze, if a prefix may cost so much."""
        return min(self.most, largest(self.cost_L, allowed))


def _allowance(risk: float, predicted: Sequence[_Predicted]) -> float:
    """The largest predicted cost with which runs of unseen families keep to their part of the risk."""
    fitting = [value for value in _ALLOWANCES.tolist() if replay(predicted, value)[0] <= _SPENT * risk]
    return float(max(fitting, default=0.0))


def predict_unseen(runs: Sequence[FirstPrefixes], unseen: dict[str, PrefixModel]) -> list[_Predicted]:
    """Each run as the model without its family sees it."""
    known = ((run, unseen[run.family]) for run in runs)
    return [_Predicted(run, model.costs(run.look, run.steps), model.most(_measured(run.look))) for run, model in known]


def replay(predicted: Sequence[_Predicted], allowed: float) -> tuple[float, float]:
    """Percentage points lost and the FLOPs of a step, if each run freezes what may cost so much.

    Means over families of their runs' means, and over predictions that are off by a factor.
    """
    lost: dict[str, list[float]] = {}
    left: dict[str, list[float]] = {}
    for each, factor in itertools.product(predicted, _UNSURE.tolist()):
        run, size = each.run, each.freezes(allowed * factor)
        sizes, costs = np.append(0, run.size_F), np.append(0.0, run.lost_F)
        lost.setdefault(run.family, []).append(float(np.interp(size, sizes, costs)))
        left.setdefault(run.family, []).append(float(run.step_F[size]))
    return _mean_of_means(lost), _mean_of_means(left)


def _mean_of_means(by_family: dict[str, list[float]]) -> float:
    return float(np.mean([np.mean(values) for values in by_family.values()]))


def _card(
    runs: Sequence[FirstPrefixes],
    freezing: Sequence[FirstPrefixes],
    predicted: Sequence[_Predicted],
    model: PrefixModel,
) -> dict[str, Any]:
    replays = [(risk, *replay(predicted, allowed)) for risk, allowed in model.allowances]
    families = [run.family for run in runs]
    return {
        "runs": len(runs),
        "fitted": len(freezing),
        "replayed": len(predicted),
        "fewest_steps": model.fewest_steps,
        "most_steps": model.most_steps,
        "families": {family: families.count(family) for family in sorted(set(families))},
        "replays": [dict(zip(("risk", "points", "flops"), each, strict=True)) for each in replays],
    }

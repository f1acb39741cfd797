"""Fits the model of what a prefix costs that freezes before the first step, and what may be risked with it."""

import itertools
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
USED = ("gradient",)
"""The features that it is fitted to: see `predictor.model.first_prefix.features`."""
_RIDGE = 3.0
_SPENT = 0.5
"""The share of a risk that may be spent before the first step. What freezes later takes the other half."""
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


def fit_first_prefix(
    runs: Sequence[FirstPrefixes], shorter: Sequence[FirstPrefixes] = ()
) -> tuple[PrefixModel, dict[str, Any]]:
    """Fit the model to runs. Returns it and what a card says about it.

    What may be risked comes from families that it was not fitted to, each left out in turn, and from those of their
    runs in which a prefix may freeze at all: in the others the first layer has learned nothing yet.

    Args:
        runs: what the model is fitted to.
        shorter: runs of shorter trainings. They have the same line, and allowances of their own.

    Raises:
        UsageError: the runs are of fewer than two families, no prefix may freeze in any, or the shorter ones are not
            shorter.
    """
    families = sorted({run.family for run in runs})
    if len(families) < 2:
        raise UsageError(f"{len(runs)} runs of {len(families)} families: a family is left out in turn, so give two")
    line = PrefixModel(*_line(runs))
    without = {family: PrefixModel(*_line([run for run in runs if run.family != family])) for family in families}
    model, card = _with_allowances(runs, line, without)
    if not shorter:
        return model, card
    longest = max(run.steps for run in shorter)
    if longest >= model.fewest_steps:
        raise UsageError(
            f"shorter runs of up to {longest} steps, and others from {model.fewest_steps} on: they must be shorter"
        )
    known = {run.family: without.get(run.family, line) for run in shorter}
    below, figures = _with_allowances(shorter, line, known)
    return replace(model, shorter=below), {**card, "shorter": figures}


def _with_allowances(
    runs: Sequence[FirstPrefixes], line: PrefixModel, without: dict[str, PrefixModel]
) -> tuple[PrefixModel, dict[str, Any]]:
    """The line with what may be risked in trainings as long as the runs, and what a card says about it.

    without: by family, the line that was fitted to the others.
    """
    predicted = [each for each in predict_unseen(runs, without) if each.most]
    if not predicted:
        raise UsageError(f"of {len(runs)} runs none has a first layer that has learned something: give pretrained ones")
    allowances = tuple((risk, _allowance(risk, predicted)) for risk in RISKS)
    model = replace(line, allowances=allowances, fewest_steps=min(run.steps for run in runs))
    return model, _card(runs, predicted, model)


def _line(runs: Sequence[FirstPrefixes]) -> tuple[float, dict[str, float]]:
    """Intercept and weights by ridge regression. Every family weighs the same."""
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
    return middle - float(slope_C @ mean_C), dict(zip(USED, slope_C.tolist(), strict=True))


def _inputs(runs: Iterable[FirstPrefixes]) -> Floats:
    known = [(run, features(run.look)) for run in runs]
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

    @property
    def most(self) -> int:
        """How many layers may freeze at the most: see `FirstLook.learned`."""
        return self.run.look.learned if self.run.look.evidence_L else len(self.cost_L)

    def freezes(self, allowed: float) -> int:
        """How many layers freeze, if a prefix may cost so much."""
        return min(self.most, largest(self.cost_L, allowed))


def _allowance(risk: float, predicted: Sequence[_Predicted]) -> float:
    """The largest predicted cost with which runs of unseen families keep to their part of the risk."""
    fitting = [value for value in _ALLOWANCES.tolist() if replay(predicted, value)[0] <= _SPENT * risk]
    return float(max(fitting, default=0.0))


def predict_unseen(runs: Sequence[FirstPrefixes], unseen: dict[str, PrefixModel]) -> list[_Predicted]:
    """Each run as the model without its family sees it."""
    return [_Predicted(run, unseen[run.family].costs(run.look)) for run in runs]


def replay(predicted: Sequence[_Predicted], allowed: float) -> tuple[float, float]:
    """Percentage points lost and the FLOPs of a step, if each run freezes what may cost so much.

    Means over families of their runs' means, and over predictions that are off by a factor.
    """
    lost: dict[str, list[float]] = {}
    left: dict[str, list[float]] = {}
    for each, factor in itertools.product(predicted, _UNSURE.tolist()):
        run, size = each.run, each.freezes(allowed * factor)
        sizes, costs = np.append(0, run.size_F), np.append(0.0, run.cost_F)
        lost.setdefault(run.family, []).append(float(np.interp(size, sizes, costs)))
        left.setdefault(run.family, []).append(float(run.step_F[size]))
    return _mean_of_means(lost), _mean_of_means(left)


def _mean_of_means(by_family: dict[str, list[float]]) -> float:
    return float(np.mean([np.mean(values) for values in by_family.values()]))


def _card(runs: Sequence[FirstPrefixes], predicted: Sequence[_Predicted], model: PrefixModel) -> dict[str, Any]:
    replays = [(risk, *replay(predicted, allowed)) for risk, allowed in model.allowances]
    families = [run.family for run in runs]
    return {
        "runs": len(runs),
        "replayed": len(predicted),
        "fewest_steps": model.fewest_steps,
        "most_steps": max(run.steps for run in runs),
        "families": {family: families.count(family) for family in sorted(set(families))},
        "replays": [dict(zip(("risk", "points", "flops"), each, strict=True)) for each in replays],
    }

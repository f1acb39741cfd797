"""From the accuracy that a user is willing to lose to a threshold.

Predictors that have not seen a family give the probabilities of its runs. These are calibrated, and the runs replayed
with a frozen prefix that grows as the probabilities say. What that costs has been measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.model.decision import largest_prefix, saved_by
from predictor.model.network import FreezePredictor
from predictor.training.config import FitConfig
from predictor.training.dataset import RunWindows, WindowSet
from predictor.training.fit import FitResult, fit_on
from predictor.training.metrics import Bools, Floats
from predictor.training.splits import families_of, runs_of, split_by_run

RISKS = (0.1, 0.25, 0.5, 1.0, 2.0)
"""Percentage points of accuracy for which a predictor file has thresholds."""
DEFAULT_RISK = 0.5
_THRESHOLDS = 200
_SMALLEST = 1e-7
"""Probabilities nearer to 0 or 1 are moved to this distance, near the precision of float32."""


@dataclass(frozen=True)
class Calibration:
    """logit -> slope * logit + shift. It keeps the order of the probabilities.

    This is Platt scaling (Platt 1999, "Probabilistic outputs for support vector machines").
    """

    slope: float = 1.0
    """Above 0. Below 1 for a model whose probabilities are too extreme."""
    shift: float = 0.0

    def __call__(self, probability_N: Floats) -> Floats:
        """The calibrated probabilities."""
        return np.asarray(1 / (1 + np.exp(-(self.slope * _logit(probability_N) + self.shift))))

    @torch.no_grad()
    def apply_to(self, model: FreezePredictor) -> None:
        """Change the output layer of `model` so that its logits are calibrated."""
        last = model.output[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(self.slope)
        last.bias.mul_(self.slope).add_(self.shift)


def fit_calibration(labels_N: Bools, probability_N: Floats) -> Calibration:
    """The calibration under which these labels are most likely.

    The probabilities stay as they are if no rising one fits, as for labels of one class or random probabilities.
    """
    from sklearn.linear_model import LogisticRegression

    if labels_N.all() or not labels_N.any():
        return Calibration()
    line = LogisticRegression(C=np.inf).fit(_logit(probability_N)[:, None], labels_N)
    slope, shift = float(line.coef_[0, 0]), float(line.intercept_[0])
    return Calibration(slope, shift) if slope > 0 else Calibration()


@dataclass(frozen=True)
class RiskThreshold:
    """The threshold for a risk, and what freezing with it did in the replay."""

    risk: float
    """Percentage points of accuracy that may be lost, as a mean over trainings."""
    threshold: float
    """Probability from which all layers freeze. A smaller prefix needs a higher one. 1 if no threshold keeps to the
    risk."""
    points: float
    """Percentage points that were lost, as a mean over the runs."""
    flops: float
    """FLOPs of the runs' trainings, as a share of those of full training."""
    points_elsewhere: float | None = None
    """Percentage points that were lost if the threshold of each family is chosen on the other families alone. `points`
    is at most the risk by construction, this is not. None if there is one family."""
    flops_elsewhere: float | None = None
    """FLOPs with thresholds that were chosen so."""


def with_risks(
    result: FitResult,
    windows: WindowSet,
    config: PredictorConfig,
    settings: FitConfig,
    watch: Iterable[str] | None = None,
) -> tuple[FitResult, dict[str, Any]]:
    """Give a result thresholds by risk, the default one's as its own threshold.

    Its model is calibrated in place, on the probabilities that the thresholds come from. Those of its test runs are
    left out, because calibration figures on these must not have seen their labels. The thresholds need every run, and
    the card says so.

    Args:
        result: what `fit` made of the windows.
        windows: all runs, with their `cost_TL`.
        config: what the predictor sees, and its widths.
        settings: how it was trained.
        watch: the families' names, for a progress bar.

    Returns:
        The result, and what a card says about it.

    Raises:
        UsageError: as `without_own_family` does.
    """
    probability_N = without_own_family(windows, config, settings, watch)
    seen_N = ~np.isin(windows.index[:, 0].numpy(), result.split.test)
    calibration = fit_calibration(windows.labels_N.numpy()[seen_N], probability_N[seen_N])
    calibration.apply_to(result.fitted.model)
    found = thresholds_for(windows, calibration(probability_N))
    own = next(row.threshold for row in found if row.risk == DEFAULT_RISK)
    pairs = tuple((row.risk, row.threshold) for row in found)
    card = {"calibration": {**asdict(calibration), "on_test_runs": False}, "risks": [asdict(row) for row in found]}
    return replace(result, threshold=own, risks=pairs), card


def without_own_family(
    windows: WindowSet, config: PredictorConfig, settings: FitConfig, watch: Iterable[str] | None = None
) -> Floats:
    """probability_N of each window by a predictor that was trained on the other families alone.

    Raises UsageError for a single family, and if what is left cannot train a predictor.
    """
    families = families_of(windows.runs)
    if len(families) < 2:
        raise UsageError(f"runs of {families[0]} alone: a threshold for a risk needs two families of networks or more")
    run_N = windows.index[:, 0].numpy()
    probability_N = np.zeros(len(windows))
    for family in watch or families:
        own = runs_of(windows.runs, [family])
        others = windows.subset([index for index in range(len(windows.runs)) if index not in set(own)])
        split = split_by_run(others.runs, settings.validation, settings.test, settings.split_seed)
        train = others.subset((*split.train, *split.test))
        fitted = fit_on(train, others.subset(split.validation), config, settings)
        probability_N[np.isin(run_N, own)] = fitted.probability_N(windows.subset(own))
    return probability_N


def thresholds_for(windows: WindowSet, probability_N: Floats, risks: Sequence[float] = RISKS) -> list[RiskThreshold]:
    """For each risk the lowest threshold at which, and above which everywhere, the mean loss of accuracy keeps to it.

    The runs are replayed. At each snapshot the frozen prefix grows to the largest that may freeze at the threshold (see
    `predictor.model.decision`). Growing it costs what freezing the larger prefix from there on costs, less what the
    smaller one does.
    """
    threshold_H = np.unique(np.quantile(probability_N, np.linspace(0, 1, _THRESHOLDS)))[::-1]
    run_N = windows.index[:, 0].numpy()
    parts = [
        _replay(run, windows.window, probability_N[run_N == index], threshold_H)
        for index, run in enumerate(windows.runs)
    ]
    points_RH, flops_RH = (np.stack(rows) for rows in zip(*parts, strict=True))
    family_R = np.array([run.family for run in windows.runs])
    found = []
    for risk in risks:
        lowest = _lowest(risk, points_RH)
        threshold = 1.0 if lowest < 0 else float(threshold_H[lowest])
        points, flops = (float(values_R.mean()) for values_R in _at(lowest, points_RH, flops_RH))
        elsewhere = _elsewhere(risk, family_R, points_RH, flops_RH)
        found.append(RiskThreshold(risk, threshold, points, flops, *elsewhere))
    return found


def _lowest(risk: float, points_RH: Floats) -> int:
    """The index of the lowest threshold that keeps to the risk. -1 if none does."""
    beyond = np.flatnonzero(points_RH.mean(axis=0) > risk)
    return (int(beyond[0]) if len(beyond) else points_RH.shape[1]) - 1


def _at(index: int, points_RH: Floats, flops_RH: Floats) -> tuple[Floats, Floats]:
    """Each run's percentage points and FLOPs at a threshold. Below index 0 nothing freezes."""
    runs = len(points_RH)
    return (np.zeros(runs), np.ones(runs)) if index < 0 else (points_RH[:, index], flops_RH[:, index])


def _elsewhere(
    risk: float, family_R: npt.NDArray[np.str_], points_RH: Floats, flops_RH: Floats
) -> tuple[float | None, float | None]:
    """Means over the runs, each family at the threshold that was chosen on the others."""
    families = set(family_R.tolist())
    if len(families) < 2:
        return None, None
    points_R, flops_R = np.zeros(len(family_R)), np.ones(len(family_R))
    for family in families:
        own = family_R == family
        points_R[own], flops_R[own] = _at(_lowest(risk, points_RH[~own]), points_RH[own], flops_RH[own])
    return float(points_R.mean()), float(flops_R.mean())


def _replay(run: RunWindows, window: int, probability_n: Floats, threshold_H: Floats) -> tuple[Floats, Floats]:
    """points_H and flops_H of one run at each threshold."""
    if run.cost_TL is None or run.flops_F is None:
        raise UsageError(f"run {run.run_id}: it is not known what freezing costs it")
    snapshots, layers = run.labels_TL.shape
    cost_TF = np.pad(run.cost_TL.numpy(), ((0, 0), (1, 0)))
    flops_F = run.flops_F.numpy()
    saved_L = saved_by(flops_F)
    probability_L = dict(zip(run.newest(window).tolist(), probability_n.reshape(-1, layers), strict=True))
    prefix_H = np.zeros(len(threshold_H), dtype=int)
    points_H, flops_H = np.zeros(len(threshold_H)), np.full(len(threshold_H), float(window - 1))
    for snapshot in range(window - 1, snapshots):
        if snapshot in probability_L:
            grown_H = np.maximum(largest_prefix(probability_L[snapshot], saved_L, threshold_H), prefix_H)
            points_H += cost_TF[snapshot, grown_H] - cost_TF[snapshot, prefix_H]
            prefix_H = grown_H
        if snapshot < snapshots - 1:  # after the last one no step follows
            flops_H += flops_F[prefix_H]
    return points_H, flops_H / (snapshots - 1)


def _logit(probability_N: Floats) -> Floats:
    clipped_N = np.clip(probability_N, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(clipped_N / (1 - clipped_N)))

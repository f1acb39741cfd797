"""From the accuracy that a user is willing to give up to a threshold: what freezing would have cost recorded runs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from predictor.errors import UsageError
from predictor.model.decision import front_of, saved_by
from predictor.model.network import PredictorConfig
from predictor.training.calibration import fit_calibration
from predictor.training.fit import FitConfig, FitResult, fit_on
from predictor.training.metrics import Floats
from predictor.training.splits import places_of, split_by_run
from predictor.training.windows import RunWindows, WindowSet

RISKS = (0.1, 0.25, 0.5, 1.0, 2.0)
"""Percentage points of accuracy, for which a predictor file says the threshold."""
DEFAULT_RISK = 0.5
_THRESHOLDS = 200


@dataclass(frozen=True)
class RiskThreshold:
    """The threshold for a risk, and what freezing by it did in the replay."""

    risk: float
    """Percentage points of accuracy that may be lost, as a mean over trainings."""
    threshold: float
    """Probability from which all layers freeze, a smaller front from a higher one; 1 where none keeps to the risk."""
    points: float
    """Points that were lost, as a mean over the runs."""
    flops: float
    """FLOPs of the runs' trainings, as a share of those of full training."""
    points_elsewhere: float | None = None
    """Points that were lost where the threshold of each family was chosen on the other families alone: `points` is at
    most the risk by choice, this is not. None where there is one family."""
    flops_elsewhere: float | None = None
    """FLOPs where the thresholds were chosen so."""


def families_of(windows: WindowSet) -> list[str]:
    """The families of networks among the runs, in alphabetical order."""
    return sorted({run.family for run in windows.runs})


def with_risks(
    result: FitResult,
    windows: WindowSet,
    config: PredictorConfig,
    settings: FitConfig,
    watch: Iterable[str] | None = None,
) -> tuple[FitResult, dict[str, Any]]:
    """A result with thresholds by risk, that of the default one as its own; and what a card says of it.

    Its model is calibrated in place, on the judgements that the thresholds come from, but for those of its test runs:
    calibration figures on these must not know their labels. The thresholds need every run that there is, and the card
    says so.

    Raises UsageError as `without_own_family` does.
    """
    probability_N = without_own_family(windows, config, settings, watch)
    learnt_N = ~np.isin(windows.index[:, 0].numpy(), result.split.test)
    calibration = fit_calibration(windows.labels_N.numpy()[learnt_N], probability_N[learnt_N])
    result.fitted.model.calibrate(calibration.slope, calibration.shift)
    found = thresholds_for(windows, calibration(probability_N))
    own = next(row.threshold for row in found if row.risk == DEFAULT_RISK)
    pairs = tuple((row.risk, row.threshold) for row in found)
    told = {"calibration": {**asdict(calibration), "on_test_runs": False}, "risks": [asdict(row) for row in found]}
    return replace(result, threshold=own, risks=pairs), told


def without_own_family(
    windows: WindowSet, config: PredictorConfig, settings: FitConfig, watch: Iterable[str] | None = None
) -> Floats:
    """probability_N of each window by a predictor that learnt from the other families alone.

    Raises UsageError where there is one family, or where what is left cannot train a predictor.
    """
    families = families_of(windows)
    if len(families) < 2:
        raise UsageError(f"runs of {families[0]} alone: a threshold for a risk needs two families of networks or more")
    run_N = windows.index[:, 0].numpy()
    probability_N = np.zeros(len(windows))
    for family in watch or families:
        own = places_of(windows.runs, [family])
        others = windows.subset([place for place in range(len(windows.runs)) if place not in set(own)])
        split = split_by_run(others.runs, settings.validation, settings.test, settings.split_seed)
        train = others.subset((*split.train, *split.test))
        fitted = fit_on(train, others.subset(split.validation), config, settings)
        probability_N[np.isin(run_N, own)] = fitted.probability_N(windows.subset(own))
    return probability_N


def thresholds_for(windows: WindowSet, probability_N: Floats, risks: Sequence[float] = RISKS) -> list[RiskThreshold]:
    """For each risk the lowest threshold at which, and above which everywhere, the mean loss of accuracy keeps to it.

    The runs are replayed: at each snapshot a front grows to the largest that may freeze at the threshold (see
    `predictor.model.decision`), and growing it costs what freezing the larger front from there on costs, less what the
    smaller one does.
    """
    threshold_H = np.unique(np.quantile(probability_N, np.linspace(0, 1, _THRESHOLDS)))[::-1]
    run_N = windows.index[:, 0].numpy()
    parts = [
        _replay(run, windows.window, probability_N[run_N == place], threshold_H)
        for place, run in enumerate(windows.runs)
    ]
    points_RH, flops_RH = (np.stack(rows) for rows in zip(*parts, strict=True))
    family_R = np.array([run.family for run in windows.runs])
    found = []
    for risk in risks:
        place = _lowest(risk, points_RH)
        threshold = 1.0 if place < 0 else float(threshold_H[place])
        points, flops = (float(values_R.mean()) for values_R in _at(place, points_RH, flops_RH))
        elsewhere = _elsewhere(risk, family_R, points_RH, flops_RH)
        found.append(RiskThreshold(risk, threshold, points, flops, *elsewhere))
    return found


def _lowest(risk: float, points_RH: Floats) -> int:
    """The place of the lowest threshold that keeps to the risk; -1 where none does."""
    beyond = np.flatnonzero(points_RH.mean(axis=0) > risk)
    return (int(beyond[0]) if len(beyond) else points_RH.shape[1]) - 1


def _at(place: int, points_RH: Floats, flops_RH: Floats) -> tuple[Floats, Floats]:
    """Each run's points and FLOPs at a threshold's place; below 0 nothing freezes."""
    runs = len(points_RH)
    return (np.zeros(runs), np.ones(runs)) if place < 0 else (points_RH[:, place], flops_RH[:, place])


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
    if run.harm_TL is None or run.flops_F is None:
        raise UsageError(f"run {run.run_id}: it is not known what freezing costs it")
    snapshots, layers = run.labels_TL.shape
    harm_TF = np.pad(run.harm_TL.numpy(), ((0, 0), (1, 0)))
    flops_F = run.flops_F.numpy()
    probability_TL = probability_n.reshape(-1, layers)
    saved_L = saved_by(flops_F)
    front_H = np.zeros(len(threshold_H), dtype=int)
    points_H, flops_H = np.zeros(len(threshold_H)), np.full(len(threshold_H), float(window - 1))
    for row, snapshot in enumerate(range(window - 1, snapshots)):
        grown_H = np.maximum(front_of(probability_TL[row], saved_L, threshold_H), front_H)
        points_H += harm_TF[snapshot, grown_H] - harm_TF[snapshot, front_H]
        front_H = grown_H
        if snapshot < snapshots - 1:  # after the last one no step follows
            flops_H += flops_F[front_H]
    return points_H, flops_H / (snapshots - 1)

"""What freezing a front costs a run: a surface over all steps and fronts, made of the few outcomes that there are."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.outcomes.records import Outcome
from predictor.errors import UsageError
from predictor.training.splits import HeldOut

_NOTHING = HeldOut()
_CURE = "gather its outcomes again with `python -m collect gather outcomes`"


@dataclass(frozen=True, eq=False)
class Harm:
    """What freezing a front costs one run, at each of its moments.

    A front is the first layers of a network; it is frozen from a moment to the end of the training.
    """

    run_id: str
    total_steps: int
    layer_count: int
    step_P: npt.NDArray[np.int64]
    """The moments, in optimizer steps done, rising; the last one is `total_steps`."""
    front_F: npt.NDArray[np.int64]
    """Layers in each front, rising; the first has none."""
    points_PF: npt.NDArray[np.float64]
    """Percentage points of accuracy lost. Never negative; never rises with the moment and never falls with the front;
    zero in the last row and in the first column."""
    flops_F: npt.NDArray[np.float64]
    """FLOPs of an optimizer step with each front frozen, as a share of a full step's; 1 for the front of no layers."""

    def points(self, step_T: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """points_TL: accuracy lost, in percentage points, by freezing layers 0 to l from step t to the end.

        Between what is known, the square root of the points is linear, along the fronts first and then along the
        steps: harm grows about with the square of what is taken away, as a loss does around its minimum. Before the
        first moment, and beyond the largest front, it is what it is there.
        """
        size_L = np.arange(1, self.layer_count + 1)
        root_PL = np.stack([np.interp(size_L, self.front_F, root_F) for root_F in np.sqrt(self.points_PF)])
        root_LT = np.stack([np.interp(np.asarray(step_T), self.step_P, root_P) for root_P in root_PL.T])
        points_TL: npt.NDArray[np.float64] = np.square(root_LT.T)
        return points_TL

    def flops(self) -> npt.NDArray[np.float64]:
        """FLOPs of a step with the first 0 to `layer_count` layers frozen, as a share of a full step's.

        Shape (layer_count + 1,); linear between the known fronts, and beyond the largest what it is there.
        """
        return np.interp(np.arange(self.layer_count + 1), self.front_F, self.flops_F)


def harms_of(outcomes: Iterable[Outcome], held_out: HeldOut = _NOTHING) -> dict[str, Harm]:
    """What freezing a front costs each run, by the run's id; runs with no front, and those that diverged, are left out.

    A front's harm is its extra loss times `points_per_loss` of all the outcomes, but for those of runs that are held
    out, for accuracy itself is coarse: on some hundred test samples, one sample is a quarter of a point. A front that
    diverged loses all of the unfrozen accuracy. A front that is unknown at one moment is there what its neighbours at
    that moment say, in a straight line.

    Raises UsageError where outcomes of a run do not fit together, and as `points_per_loss` does.
    """
    outcomes = tuple(outcomes)
    _check(outcomes)
    by_run: dict[str, list[Outcome]] = {}
    for front in _fronts(outcomes):
        by_run.setdefault(front.run_id, []).append(front)
    if not by_run:
        return {}
    rate = points_per_loss(own for own in outcomes if not held_out.holds(own.family, own.source))
    return {run_id: _harm(fronts, rate) for run_id, fronts in by_run.items()}


def points_per_loss(outcomes: Iterable[Outcome]) -> float:
    """Percentage points of accuracy that go with one unit of extra test loss, over all fronts that finished.

    The ratio of two sums: of 100 (unfrozen accuracy - accuracy), and of the extra loss.

    Raises UsageError where either sum is not positive: there is no rate in that.
    """
    fronts = [front for front in _fronts(outcomes) if front.result.status == "finished"]
    lost, extra = math.fsum(map(_lost, fronts)), math.fsum(front.extra_loss for front in fronts)
    if not (lost > 0 and extra > 0):
        raise UsageError(
            f"the {len(fronts)} fronts that finished lose {lost:.4g} points of accuracy for {extra:.4g} of extra loss, "
            "in sum, and both must be above 0 to tell what loss costs: gather outcomes of more runs"
        )
    return lost / extra


def _fronts(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The frozen fronts of runs that finished."""
    for outcome in outcomes:
        if outcome.kind == "front" and outcome.unfrozen.status == "finished":
            if outcome.layers != tuple(range(len(outcome.layers))):
                raise UsageError(f"run {outcome.run_id}: layers {outcome.layers} are called a front: {_CURE}")
            yield outcome


def _check(outcomes: Iterable[Outcome]) -> None:
    """Refuse outcomes of one run that speak of different trainings, and a front that has two outcomes at one step."""
    first: dict[str, Outcome] = {}
    seen = set()
    for outcome in outcomes:
        other = first.setdefault(outcome.run_id, outcome)
        for name in ("total_steps", "layer_count"):
            one, two = getattr(other, name), getattr(outcome, name)
            if one != two:
                raise UsageError(f"run {outcome.run_id}: {name} is {one} in one outcome and {two} in another: {_CURE}")
        if outcome.kind == "front" and outcome.key in seen:
            raise UsageError(
                f"run {outcome.run_id}: its front of {len(outcome.layers)} layers at step {outcome.step} comes twice: "
                "give each outcome once"
            )
        seen.add(outcome.key)


def _harm(fronts: list[Outcome], rate: float) -> Harm:
    """The surface of one run; rate: points per unit of loss."""
    run = fronts[0]
    step_M = np.array(sorted({front.step for front in fronts}), dtype=np.int64)
    size_K = np.array(sorted({len(front.layers) for front in fronts}), dtype=np.int64)
    points_MK = np.full((len(step_M), len(size_K)), np.nan)
    flops_K = np.empty(len(size_K))
    for front in fronts:
        place = np.searchsorted(size_K, len(front.layers))
        points_MK[np.searchsorted(step_M, front.step), place] = _points(front, rate)
        flops_K[place] = front.flops_share
    return Harm(
        run_id=run.run_id,
        total_steps=run.total_steps,
        layer_count=run.layer_count,
        step_P=np.append(step_M, run.total_steps),
        front_F=np.insert(size_K, 0, 0),
        points_PF=np.pad(_monotone(_filled(points_MK, size_K)).clip(min=0), ((0, 1), (1, 0))),
        flops_F=np.insert(flops_K, 0, 1.0),
    )


def _points(front: Outcome, rate: float) -> float:
    return _lost(front) if front.result.status == "diverged" else rate * front.extra_loss


def _lost(front: Outcome) -> float:
    """Percentage points of accuracy below the unfrozen run; all that it had for a front that diverged."""
    return 100 * ((front.unfrozen.final_accuracy or 0.0) - (front.result.final_accuracy or 0.0))


def _filled(points_MK: npt.NDArray[np.float64], size_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The points with each NaN replaced by what lies on the line between the known fronts of the same moment."""
    filled_MK = points_MK.copy()
    for points_K in filled_MK:
        known_K = ~np.isnan(points_K)
        known = np.append(0, size_K[known_K]), np.append(0.0, points_K[known_K])
        points_K[~known_K] = np.interp(size_K[~known_K], *known)
    return filled_MK


def _monotone(points_MK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A surface that never rises along the moments and never falls along the fronts.

    The outcomes are noisy and may come out of order. It is the mean of the smallest such surface above the points and
    the largest one below them, and the points themselves where they are in order.
    """
    above_MK = np.maximum.accumulate(np.maximum.accumulate(points_MK[::-1], axis=0)[::-1], axis=1)
    below_MK = np.minimum.accumulate(np.minimum.accumulate(points_MK, axis=0)[:, ::-1], axis=1)[:, ::-1]
    return (above_MK + below_MK) / 2

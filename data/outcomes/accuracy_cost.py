"""What freezing a prefix costs a run in accuracy: a surface over steps and prefixes, fitted to a few outcomes."""

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
class AccuracyCost:
    """What freezing a prefix costs one run, by the step from which it is frozen to the end of the training.

    A prefix is the first layers of a network, in execution order.
    """

    run_id: str
    total_steps: int
    layer_count: int
    step_P: npt.NDArray[np.int64]
    """The steps that outcomes are known for, rising. The last one is `total_steps`."""
    prefix_F: npt.NDArray[np.int64]
    """Number of layers of each known prefix, rising. The first has none."""
    cost_PF: npt.NDArray[np.float64]
    """Percentage points of accuracy lost. Never negative. Never rises with the step, and never falls with the prefix.
    Zero in the last row and in the first column."""
    flops_F: npt.NDArray[np.float64]
    """FLOPs of an optimizer step with each prefix frozen, as a share of a full step's. 1 for no layers."""
    signed_PF: npt.NDArray[np.float64]
    """The costs as they were measured: chance makes some negative, and puts them out of order. Means of them have no
    such bias as those of `cost_PF`."""

    def cost(self, step_T: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """cost_TL: percentage points of accuracy lost by freezing layers 0 to l from step t to the end.

        The square root of the cost is interpolated linearly, along the prefixes and then along the steps. The cost
        grows about with the square of the motion that is taken away, as a loss does around its minimum. Before the
        first known step, and beyond the largest known prefix, the cost is constant.
        """
        size_L = np.arange(1, self.layer_count + 1)
        root_PL = np.stack([np.interp(size_L, self.prefix_F, root_F) for root_F in np.sqrt(self.cost_PF)])
        root_LT = np.stack([np.interp(np.asarray(step_T), self.step_P, root_P) for root_P in root_PL.T])
        cost_TL: npt.NDArray[np.float64] = np.square(root_LT.T)
        return cost_TL

    def flops(self) -> npt.NDArray[np.float64]:
        """FLOPs of a step with the first 0 to `layer_count` layers frozen, as a share of a full step's.

        Shape (layer_count + 1,). Linear between the known prefixes, and constant beyond the largest.
        """
        return np.interp(np.arange(self.layer_count + 1), self.prefix_F, self.flops_F)


def accuracy_costs(outcomes: Iterable[Outcome], held_out: HeldOut = _NOTHING) -> dict[str, AccuracyCost]:
    """The accuracy cost of freezing a prefix, by run id. Runs without a frozen prefix, and diverged runs, are left out.

    Accuracy itself is coarse: of some hundred test samples, one is a quarter of a percentage point. So a prefix costs
    its extra loss times `cost_per_loss`. A prefix that diverged costs all of the unfrozen accuracy. A prefix that is
    unknown at one step gets a linear interpolation of its neighbours at that step.

    Args:
        outcomes: Outcomes of any number of runs, in any order.
        held_out: Families and sources whose outcomes do not count in `cost_per_loss`.

    Raises:
        UsageError: Outcomes of a run contradict each other, or there is no rate, as `cost_per_loss` says.
    """
    outcomes = tuple(outcomes)
    _check(outcomes)
    by_run: dict[str, list[Outcome]] = {}
    for prefix in _prefixes(outcomes):
        by_run.setdefault(prefix.run_id, []).append(prefix)
    if not by_run:
        return {}
    rate = cost_per_loss(own for own in outcomes if not held_out.holds(own.family, own.source))
    return {run_id: _surface(prefixes, rate) for run_id, prefixes in by_run.items()}


def cost_per_loss(outcomes: Iterable[Outcome]) -> float:
    """Percentage points of accuracy lost for one unit of extra test loss, over all prefixes that finished.

    The ratio of two sums: of 100 (unfrozen accuracy - accuracy), and of the extra loss.

    Raises:
        UsageError: Either sum is not positive.
    """
    prefixes = [prefix for prefix in _prefixes(outcomes) if prefix.result.status == "finished"]
    lost, extra = math.fsum(map(_lost, prefixes)), math.fsum(prefix.extra_loss for prefix in prefixes)
    if not (lost > 0 and extra > 0):
        raise UsageError(
            f"the {len(prefixes)} frozen prefixes that finished lose {lost:.4g} pp of accuracy and gain {extra:.4g} of "
            "loss in sum, and both must be above 0 to convert loss into accuracy: gather outcomes of more runs"
        )
    return lost / extra


def _prefixes(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes of freezing a prefix."""
    for outcome in outcomes:
        if outcome.kind == "front":
            if outcome.layers != tuple(range(len(outcome.layers))):
                raise UsageError(
                    f"run {outcome.run_id}: layers {outcome.layers} of kind 'front' are no prefix: {_CURE}"
                )
            yield outcome


def _check(outcomes: Iterable[Outcome]) -> None:
    """Refuse outcomes of one run that are of different trainings, and two of one prefix at one step."""
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
                f"run {outcome.run_id}: its prefix of {len(outcome.layers)} layers at step {outcome.step} comes twice: "
                "give each outcome once"
            )
        seen.add(outcome.key)


def _surface(prefixes: list[Outcome], rate: float) -> AccuracyCost:
    """The surface of one run. rate: percentage points per unit of loss."""
    run = prefixes[0]
    step_M = np.array(sorted({prefix.step for prefix in prefixes}), dtype=np.int64)
    size_K = np.array(sorted({len(prefix.layers) for prefix in prefixes}), dtype=np.int64)
    cost_MK = np.full((len(step_M), len(size_K)), np.nan)
    flops_K = np.empty(len(size_K))
    for prefix in prefixes:
        column = np.searchsorted(size_K, len(prefix.layers))
        cost_MK[np.searchsorted(step_M, prefix.step), column] = _cost(prefix, rate)
        flops_K[column] = prefix.flops_share
    filled_MK = _filled(cost_MK, size_K)
    return AccuracyCost(
        run_id=run.run_id,
        total_steps=run.total_steps,
        layer_count=run.layer_count,
        step_P=np.append(step_M, run.total_steps),
        prefix_F=np.insert(size_K, 0, 0),
        cost_PF=np.pad(_monotone(filled_MK).clip(min=0), ((0, 1), (1, 0))),
        flops_F=np.insert(flops_K, 0, 1.0),
        signed_PF=np.pad(filled_MK, ((0, 1), (1, 0))),
    )


def _cost(prefix: Outcome, rate: float) -> float:
    return _lost(prefix) if prefix.result.status == "diverged" else rate * prefix.extra_loss


def _lost(prefix: Outcome) -> float:
    """Percentage points of accuracy below the unfrozen run. All of its accuracy where this one diverged."""
    return 100 * ((prefix.unfrozen.final_accuracy or 0.0) - (prefix.result.final_accuracy or 0.0))


def _filled(cost_MK: npt.NDArray[np.float64], size_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The costs with each NaN interpolated linearly between the known prefixes of the same step."""
    filled_MK: npt.NDArray[np.float64] = cost_MK.copy()
    for cost_K in filled_MK:
        known_K = ~np.isnan(cost_K)
        known = np.append(0, size_K[known_K]), np.append(0.0, cost_K[known_K])
        cost_K[~known_K] = np.interp(size_K[~known_K], *known)
    return filled_MK


def _monotone(cost_MK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A surface that never rises along the steps and never falls along the prefixes.

    Outcomes are noisy and may be out of order. The surface is the mean of the smallest monotone one above the costs and
    the largest monotone one below them. Costs that are in order stay as they are.
    """
    above_MK = np.maximum.accumulate(np.maximum.accumulate(cost_MK[::-1], axis=0)[::-1], axis=1)
    below_MK = np.minimum.accumulate(np.minimum.accumulate(cost_MK, axis=0)[:, ::-1], axis=1)[:, ::-1]
    return (above_MK + below_MK) / 2

"""The compute multiplier: how much more compute simply training for fewer steps takes to reach the same accuracy.

On one workload, the curve of full training is the best accuracy that training without freezing reaches at each cost:
over the whole training and every shorter one that the suite holds, with the schedule rescaled (`shorter`) or stopped
early (`stopped`). Lengths that another one beats in both cost and accuracy are left out, and between two lengths the
curve is a straight line. Then

    multiplier = FLOPs at which the curve reaches the policy's accuracy / FLOPs of the policy.

Above 1, the policy spends compute better than the best choice of a training length. The figure needs no margin, and a
baseline that trains too long does not raise it. Over several workloads it is the geometric mean.

Outside of the curve it is a bound. A policy more accurate than every length counts as if it were as accurate as the
best one, so its multiplier is at least the value given. One less accurate than the shortest length counts as if it
were as accurate as that one, so its multiplier is at most the value given.

The interval is a jackknife over paired seeds. Curve and policy are means over seeds, and the multiplier is far from
linear in a single seed's accuracy: the curve is nearly flat at its end, so one seed alone falls off it half of the
time. So each seed is left out in turn, from the curve and the policy alike. The pseudo-values, n times the logarithm
with all seeds less n - 1 times that without one, then get Student's interval as everywhere in the report (Tukey 1958).
A bootstrap of three seeds has ten different samples, and its intervals come out too narrow. Where the value is a bound,
so is the interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from evaluate.analysis.pareto import unbeaten
from evaluate.analysis.statistics import Estimate, estimate
from evaluate.trials.records import Results, Trial

_FULL_TRAINING = ("none", "shorter", "stopped")
# Accuracies are shares of a thousand test samples or so: means that differ by less are equal.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Multiplier:
    """A policy's compute multiplier on one workload, or the geometric mean over several."""

    value: Estimate
    at_least: bool = False
    """Whether the policy is more accurate than every length of full training, on this or one of the workloads."""
    at_most: bool = False
    """Whether it is less accurate than the shortest length, on this or one of the workloads."""


@dataclass(frozen=True)
class _Point:
    """A training's cost in FLOPs and its accuracy."""

    flops: float
    accuracy: float


@dataclass(frozen=True)
class _OnWorkload:
    """A policy's logarithm of the multiplier on one workload, and the pseudo-value of each seed."""

    log: float
    pseudo: tuple[float, ...]
    at_least: bool
    at_most: bool


def compute_multipliers(results: Results) -> dict[tuple[str | None, str], Multiplier]:
    """The compute multipliers by workload and policy; under the workload None, over all workloads.

    A policy has none on a workload where a training of it diverged or failed though the baseline's did not, where FLOPs
    were not counted, or where full training was run at one length only; and none over all workloads if it lacks one on
    any of them. Seeds that were not run are left out of the curve too.
    """
    multipliers: dict[tuple[str | None, str], Multiplier] = {}
    for policy in results.policies:
        found = {workload: _on_workload(results, workload, policy) for workload in results.workloads}
        known = {workload: each for workload, each in found.items() if each is not None}
        multipliers |= {(workload, policy): _combined([each]) for workload, each in known.items()}
        if known and len(known) == len(found):
            multipliers[None, policy] = _combined(list(known.values()))
    return multipliers


def full_training_lengths(results: Results) -> list[str]:
    """The labels of the policies that are full training of some length, with nothing else changed."""
    return [label for label in results.policies if _is_full_training(results, label)]


def flops_on_curve(lengths: Sequence[tuple[float, float]], accuracy: float) -> tuple[float, int]:
    """FLOPs at which full training reaches an accuracy.

    Args:
        lengths: FLOPs and accuracy of each length of full training, in any order.
        accuracy: What is to be reached.

    Returns:
        The FLOPs, clamped to the curve, and where the accuracy lies: 1 above the curve, -1 below it, 0 on it.
    """
    curve = unbeaten(lengths, lambda each: each[0], lambda each: each[1])
    (cheapest, lowest), (dearest, highest) = curve[0], curve[-1]
    if accuracy <= lowest:
        return cheapest, -1 if accuracy < lowest - _ROUNDING else 0
    if accuracy >= highest:
        return dearest, 1 if accuracy > highest + _ROUNDING else 0
    (left, low), (right, high) = next(pair for pair in pairwise(curve) if pair[0][1] <= accuracy < pair[1][1])
    return left + (right - left) * (accuracy - low) / (high - low), 0


def _combined(parts: Sequence[_OnWorkload]) -> Multiplier:
    """The geometric mean over workloads, whose interval is centred on it rather than on the pseudo-values' mean."""
    spread = estimate([part.pseudo for part in parts])
    assert spread is not None
    mean = fmean(part.log for part in parts)
    half = spread.high - spread.mean
    low, high = (math.exp(mean - half), math.exp(mean + half)) if spread.bounded else (-math.inf, math.inf)
    value = Estimate(math.exp(mean), low, high, spread.count)
    return Multiplier(value, any(part.at_least for part in parts), any(part.at_most for part in parts))


def _on_workload(results: Results, workload: str, policy: str) -> _OnWorkload | None:
    """None where there is no multiplier."""
    baseline, own = results.cell(workload, results.suite.baseline), results.cell(workload, policy)
    if any(trial.status != "finished" and seed in baseline for seed, trial in own.items()):
        return None  # to leave a lost seed out would reward the policy for losing it
    policy_points = _points(own)
    seeds = sorted(set(_points(baseline)) & set(policy_points))
    of_length = [_points(results.cell(workload, label)) for label in full_training_lengths(results)]
    lengths = [points for points in of_length if set(seeds) <= set(points)]
    if not seeds or len(lengths) < 2:
        return None
    log, side = _log(lengths, policy_points, seeds)
    kept = [[seed for seed in seeds if seed != left_out] for left_out in seeds] if len(seeds) > 1 else []
    without = [_log(lengths, policy_points, some)[0] for some in kept]
    pseudo = tuple(len(seeds) * log - (len(seeds) - 1) * each for each in without) or (log,)
    return _OnWorkload(log, pseudo, side > 0, side < 0)


def _log(lengths: Sequence[Mapping[int, _Point]], own: Mapping[int, _Point], seeds: Sequence[int]) -> tuple[float, int]:
    """The logarithm of the multiplier with these seeds, and on which side of the curve the policy lies."""
    curve = [_mean(length, seeds) for length in lengths]
    policy = _mean(own, seeds)
    flops, side = flops_on_curve([(point.flops, point.accuracy) for point in curve], policy.accuracy)
    return math.log(flops / policy.flops), side


def _mean(points: Mapping[int, _Point], seeds: Sequence[int]) -> _Point:
    return _Point(fmean(points[seed].flops for seed in seeds), fmean(points[seed].accuracy for seed in seeds))


def _points(cell: Mapping[int, Trial]) -> dict[int, _Point]:
    """By seed, the trainings that finished and whose FLOPs were counted."""
    return {
        seed: _Point(trial.flops, trial.accuracy)
        for seed, trial in cell.items()
        if trial.status == "finished" and trial.flops and trial.flops > 0 and trial.accuracy is not None
    }


def _is_full_training(results: Results, label: str) -> bool:
    """Whether a policy freezes nothing and changes nothing but the length."""
    trials = (trial for workload in results.workloads for trial in results.cell(workload, label).values())
    entry = next((trial.config.get("policy") for trial in trials), None)
    return (
        isinstance(entry, Mapping)
        and entry.get("name") in _FULL_TRAINING
        and set(entry) <= {"name", "label", "options"}
        and set(entry.get("options") or {}) <= {"budget", "schedule", "cooldown"}
    )

"""The compute multiplier: how much more compute simply training for fewer steps takes to reach the same accuracy.

On one workload, the curve of full training is the best accuracy that training without freezing reaches at each cost:
over the whole training and every shorter one that the suite holds, whatever becomes of the schedule there (rescaled,
falling to zero in a straight line, broken off, or broken off after a cool-down), from a random and from a probed head.
Lengths that another one beats in both cost and accuracy are left out, and between two lengths the curve is a straight
line. A length that was planned with fewer seeds than the baseline is no part of the curve, so that all policies of a
finished suite meet the same one. Then

    multiplier = FLOPs at which the curve reaches the policy's accuracy / FLOPs of the policy.

Above 1, the policy spends compute better than the best choice of a training length. The figure needs no margin, and a
baseline that trains too long does not raise it. Over several workloads it is the geometric mean, and the smallest of
the workloads' stands beside it: a mean hides the network on which a policy does not pay.

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

from evaluate.analysis.pareto import ROUNDING, unbeaten
from evaluate.analysis.statistics import Estimate, estimate, log_of, ratio_of
from evaluate.trials.records import Results, Trial

_FULL_TRAINING = ("none", "shorter", "stopped")
_SAME_TRAINING = {"name", "label", "options", "probe"}
"""The keys of a policy's entry that leave full training what it is. A probed head only begins it elsewhere."""
_LENGTH = {"budget", "schedule", "cooldown"}
"""The options that choose a length, and what becomes of the schedule."""


@dataclass(frozen=True)
class Multiplier:
    """A policy's compute multiplier on one workload, or the geometric mean over several."""

    value: Estimate
    above: tuple[str, ...] = ()
    """The workloads on which the policy is more accurate than every length of full training."""
    below: tuple[str, ...] = ()
    """Those on which it is less accurate than the shortest length."""
    by_workload: tuple[tuple[str, float], ...] = ()
    """Each workload and the multiplier there."""

    @property
    def at_least(self) -> bool:
        """Whether the value is a lower bound, on one of the workloads at least."""
        return bool(self.above)

    @property
    def at_most(self) -> bool:
        """Whether the value is an upper bound, on one of the workloads at least."""
        return bool(self.below)

    @property
    def lowest(self) -> tuple[str, float]:
        """The workload with the smallest multiplier, and that multiplier."""
        return min(self.by_workload, key=lambda each: each[1])


@dataclass(frozen=True)
class CurvePoint:
    """Trainings of a policy, or of a length of full training: means over seeds."""

    label: str
    flops: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """Full training on one workload, of every length that was trained with all of the seeds."""

    seeds: tuple[int, ...]
    points: tuple[CurvePoint, ...]
    """The lengths that make the curve, cheapest first."""
    beaten: tuple[CurvePoint, ...]
    """Those that another one beats in both cost and accuracy."""

    def flops(self, accuracy: float) -> float:
        """The FLOPs with which full training reaches an accuracy, clamped to the curve."""
        return flops_on_curve([(point.flops, point.accuracy) for point in self.points], accuracy)[0]


@dataclass(frozen=True)
class _Point:
    """A training's cost in FLOPs and its accuracy."""

    flops: float
    accuracy: float


@dataclass(frozen=True)
class _OnWorkload:
    """A policy's logarithm of the multiplier on one workload, and the pseudo-value of each seed."""

    workload: str
    log: float
    pseudo: tuple[float, ...]
    side: int
    """1 above the curve, -1 below it, 0 on it."""


def compute_multipliers(results: Results) -> dict[tuple[str | None, str], Multiplier]:
    """The compute multipliers by workload and policy, by group of workloads, and under None over all workloads.

    A policy has none on a workload where a training of it diverged or failed though the baseline's did not, where FLOPs
    were not counted, or where full training was run at one length only; and none over all workloads if it lacks one on
    any of them. Seeds that were not run are left out of the curve too.
    """
    multipliers: dict[tuple[str | None, str], Multiplier] = {}
    together: list[tuple[str | None, tuple[str, ...]]] = [*results.groups.items(), (None, results.workloads)]
    for policy in results.policies:
        found = {workload: _on_workload(results, workload, policy) for workload in results.workloads}
        known = {workload: each for workload, each in found.items() if each is not None}
        multipliers |= {(workload, policy): _combined([each]) for workload, each in known.items()}
        for name, workloads in together:
            if workloads and set(workloads) <= set(known):
                multipliers[name, policy] = _combined([known[workload] for workload in workloads])
    return multipliers


def full_training_lengths(results: Results) -> list[str]:
    """The labels of the policies that are full training of some length, with nothing else changed."""
    return [label for label in results.policies if _is_full_training(results, label)]


def curve_lengths(results: Results, *workloads: str) -> list[str]:
    """Those that were planned with all of the baseline's seeds on each of the workloads; of all without any."""

    def seeds(workload: str, label: str) -> set[int]:
        return set(results.suite.seeds_of(workload, label))

    baseline, names = results.suite.baseline, workloads or results.workloads
    lengths = full_training_lengths(results)
    return [label for label in lengths if all(seeds(name, baseline) <= seeds(name, label) for name in names)]


def lengths_not_trained(results: Results) -> list[tuple[str, str]]:
    """Workloads and lengths of full training that the curve lacks, for not all of the baseline's seeds finished.

    A curve without them is lower, and multipliers are larger for it.
    """
    seeds = {name: set(_points(results.cell(name, results.suite.baseline))) for name in results.workloads}
    cells = [(name, label) for name in results.workloads for label in curve_lengths(results, name)]
    return [(name, label) for name, label in cells if not seeds[name] <= set(_points(results.cell(name, label)))]


def full_training_curve(results: Results, workload: str) -> Curve | None:
    """The curve of full training over the seeds with which the baseline finished; None with fewer than two lengths."""
    seeds = sorted(_points(results.cell(workload, results.suite.baseline)))
    known = [(label, _points(results.cell(workload, label))) for label in curve_lengths(results, workload)]
    means = [(label, _mean(points, seeds)) for label, points in known if seeds and set(seeds) <= set(points)]
    if len(means) < 2:
        return None
    lengths = [CurvePoint(label, mean.flops, mean.accuracy) for label, mean in means]
    curve = unbeaten(lengths, lambda each: each.flops, lambda each: each.accuracy)
    return Curve(tuple(seeds), tuple(curve), tuple(each for each in lengths if each not in curve))


def policy_point(results: Results, workload: str, policy: str, curve: Curve) -> CurvePoint | None:
    """A policy in the plane of a curve: as far from full training as with the seeds that both have.

    None where they share none, or where the policy lost one.
    """
    baseline, own = (results.cell(workload, label) for label in (results.suite.baseline, policy))
    full, points = _points(baseline), _points(own)
    seeds = [seed for seed in curve.seeds if seed in points]
    if not seeds or _lost_one(own, full):
        return None
    whole, paired, mean = _mean(full, curve.seeds), _mean(full, seeds), _mean(points, seeds)
    accuracy = whole.accuracy + mean.accuracy - paired.accuracy
    return CurvePoint(policy, whole.flops * mean.flops / paired.flops, accuracy)


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
        return cheapest, -1 if accuracy < lowest - ROUNDING else 0
    if accuracy >= highest:
        return dearest, 1 if accuracy > highest + ROUNDING else 0
    (left, low), (right, high) = next(pair for pair in pairwise(curve) if pair[0][1] <= accuracy < pair[1][1])
    return left + (right - left) * (accuracy - low) / (high - low), 0


def _combined(parts: Sequence[_OnWorkload]) -> Multiplier:
    """The geometric mean over workloads, whose interval is centred on it rather than on the pseudo-values' mean."""
    spread = estimate([part.pseudo for part in parts])
    assert spread is not None
    mean = fmean(part.log for part in parts)
    half = spread.high - spread.mean
    low, high = (ratio_of(mean - half), ratio_of(mean + half)) if spread.bounded else (-math.inf, math.inf)
    return Multiplier(
        Estimate(ratio_of(mean), low, high, spread.count),
        above=tuple(part.workload for part in parts if part.side > 0),
        below=tuple(part.workload for part in parts if part.side < 0),
        by_workload=tuple((part.workload, ratio_of(part.log)) for part in parts),
    )


def _on_workload(results: Results, workload: str, policy: str) -> _OnWorkload | None:
    """None where there is no multiplier."""
    baseline, own = _points(results.cell(workload, results.suite.baseline)), results.cell(workload, policy)
    if _lost_one(own, baseline):
        return None
    policy_points = _points(own)
    seeds = sorted(set(baseline) & set(policy_points))
    of_length = [_points(results.cell(workload, label)) for label in curve_lengths(results, workload)]
    lengths = [points for points in of_length if set(seeds) <= set(points)]
    if not seeds or len(lengths) < 2:
        return None
    log, side = _log(lengths, policy_points, seeds)
    kept = [[seed for seed in seeds if seed != left_out] for left_out in seeds] if len(seeds) > 1 else []
    without = [_log(lengths, policy_points, some)[0] for some in kept]
    pseudo = tuple(len(seeds) * log - (len(seeds) - 1) * each for each in without) or (log,)
    return _OnWorkload(workload, log, pseudo, side)


def _log(lengths: Sequence[Mapping[int, _Point]], own: Mapping[int, _Point], seeds: Sequence[int]) -> tuple[float, int]:
    """The logarithm of the multiplier with these seeds, and on which side of the curve the policy lies."""
    curve = [_mean(length, seeds) for length in lengths]
    policy = _mean(own, seeds)
    flops, side = flops_on_curve([(point.flops, point.accuracy) for point in curve], policy.accuracy)
    return log_of(flops / policy.flops), side


def _mean(points: Mapping[int, _Point], seeds: Sequence[int]) -> _Point:
    return _Point(fmean(points[seed].flops for seed in seeds), fmean(points[seed].accuracy for seed in seeds))


def _points(cell: Mapping[int, Trial]) -> dict[int, _Point]:
    """By seed, the trainings that finished and whose FLOPs were counted."""
    return {
        seed: _Point(trial.flops, trial.accuracy)
        for seed, trial in cell.items()
        if trial.status == "finished" and trial.flops and trial.flops > 0 and trial.accuracy is not None
    }


def _lost_one(own: Mapping[int, Trial], baseline: Mapping[int, _Point]) -> bool:
    """Whether a training was lost though the baseline's finished: to leave it out would reward the policy for it."""
    return any(trial.status != "finished" and seed in baseline for seed, trial in own.items())


def _is_full_training(results: Results, label: str) -> bool:
    """Whether a policy freezes nothing and changes nothing but the length."""
    trials = (trial for workload in results.workloads for trial in results.cell(workload, label).values())
    entry = next((trial.config.get("policy") for trial in trials), None)
    return (
        isinstance(entry, Mapping)
        and entry.get("name") in _FULL_TRAINING
        and set(entry) <= _SAME_TRAINING
        and set(entry.get("options") or {}) <= _LENGTH
    )

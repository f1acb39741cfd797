"""Paired comparison over seeds: accuracy differences, speedups, and whether a policy is as accurate as the baseline.

A pair is two finished trials of one workload with one seed: one under the policy, one under the baseline. They share
their initial weights and the order of their samples, so their difference varies less than the accuracies do.

Over several workloads every workload weighs the same, however many seeds it has: the mean is the mean of the
workloads' means. Its interval treats the workloads as fixed and the seeds as drawn, so its variance is
sum over workloads of s_w^2 / n_w, divided by the square of their number, with the degrees of freedom of Welch and
Satterthwaite, because some workloads scatter much more than others. The alternative, the workloads as a random sample
too, would need many workloads that were not picked by hand; with two or three of them it says nothing. So the interval
is about other seeds on these workloads, not about other workloads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from scipy.special import stdtrit

from evaluate.trials.records import Results, Trial

AS_ACCURATE = "as accurate"
LESS_ACCURATE = "less accurate"
CANNOT_TELL = "cannot tell"
BASELINE = "baseline"
CONFIDENCE = 0.95
# Differences of accuracies carry rounding errors of this size at most: one that equals the margin is within it.
_ROUNDING = 1e-12
# No ratio of costs lies farther from 1, but for nonsense in a file; and further on, what is made of it overflows.
_FARTHEST = 1e300


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided 95 % interval, infinitely wide where the spread cannot be estimated."""

    mean: float
    low: float
    high: float
    count: int
    """Pairs that it rests on."""

    @property
    def bounded(self) -> bool:
        """Whether there are enough pairs for an interval."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class Row:
    """A policy on one workload, or on all of them, beside the baseline."""

    workload: str | None
    """None: over all workloads. Or a group of workloads, by the name that `Results.groups` gives it."""
    policy: str
    accuracy: float | None
    """Mean over the finished trials; over all workloads: the mean of the workloads' means."""
    accuracy_deviation: float | None
    """Standard deviation over the seeds; None over all workloads."""
    difference: Estimate | None
    """Accuracy less the baseline's, over pairs."""
    verdict: str
    reason: str
    """What kept the verdict from being clear, besides an interval with the margin inside it; else empty."""
    gap: str
    """Which trainings its means leave out: lost ones, or whole workloads; empty for a row that can be ranked."""
    speedup: Estimate | None
    """The baseline's cost over the policy's, geometric mean over pairs."""
    flops_share: float | None
    """The policy's FLOPs over the baseline's, geometric mean over pairs."""
    policy_share: float | None
    """The share of the training time that the policy spent on itself."""
    finished: int
    diverged: int
    failed: int
    planned: int


def estimate(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """The mean of the groups' means with its interval; empty groups are left out, and None is given without any value.

    With one group this is Student's t interval. A group of a single value makes the interval infinitely wide.
    """
    groups = [group for group in groups if group]
    if not groups:
        return None
    mean, count = fmean(map(fmean, groups)), sum(map(len, groups))
    if any(len(group) < 2 for group in groups):
        return Estimate(mean, -math.inf, math.inf, count)
    parts = [variance(group) / len(group) / len(groups) ** 2 for group in groups]
    squares = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    freedom = sum(parts) ** 2 / squares if squares else count - len(groups)
    half = float(stdtrit(freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(sum(parts))
    return Estimate(mean, mean - half, mean + half, count)


def geometric(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """`estimate` on logarithms: the geometric mean of ratios with its interval."""
    logs = estimate([[log_of(ratio) for ratio in group] for group in groups])
    if logs is None:
        return None
    low, high = (ratio_of(logs.low), ratio_of(logs.high)) if logs.bounded else (-math.inf, math.inf)
    return Estimate(ratio_of(logs.mean), low, high, logs.count)


def log_of(ratio: float) -> float:
    """The logarithm; of a quotient so large or small that it became infinity or zero, that of the farthest ratio."""
    return math.log(min(max(ratio, 1 / _FARTHEST), _FARTHEST))


def ratio_of(log: float) -> float:
    """The ratio of a logarithm, which as the end of a wide interval may be larger than any that went in."""
    farthest = math.log(_FARTHEST)
    return math.exp(min(max(log, -farthest), farthest))


def verdict(difference: Estimate | None, margin: float) -> str:
    """Non-inferiority at `margin`, both accuracy differences as shares of 1.

    "as accurate": the whole interval lies at or above -margin. "less accurate": the whole interval lies below -margin.
    "cannot tell": -margin lies inside it, or there is no interval (fewer than two pairs in some workload).
    """
    if difference is None or not difference.bounded:
        return CANNOT_TELL
    if difference.low >= -margin - _ROUNDING:
        return AS_ACCURATE
    return LESS_ACCURATE if difference.high < -margin - _ROUNDING else CANNOT_TELL


def compare(results: Results) -> list[Row]:
    """Every policy on every workload, on every group of them, and, where there are several, over all of them."""
    parts: list[tuple[str | None, tuple[str, ...]]] = [(name, (name,)) for name in results.workloads]
    parts += results.groups.items()
    if len(results.workloads) > 1:
        parts.append((None, results.workloads))
    return [_row(results, policy, name, workloads) for name, workloads in parts for policy in results.policies]


def overall(rows: Sequence[Row]) -> list[Row]:
    """The rows over all workloads; with a single workload, its rows."""
    return [row for row in rows if row.workload is None] or list(rows)


def percentage_points(share: float) -> str:
    """A share of all samples, such as a margin, in percentage points."""
    return f"{share * 100:g} percentage point{'' if share == 0.01 else 's'}"


def cheapest(results: Results, rows: Sequence[Row]) -> str:
    """What the suite shows, in one sentence: the fastest policy that is shown to be as accurate as the baseline and
    faster.

    One whose mean is larger still, with an interval that reaches to 1, is not shown to be faster at all.
    """
    suite = results.suite
    within = f"as accurate as {suite.baseline} within {percentage_points(suite.margin)}"
    good = [(row.policy, row.speedup) for row in overall(rows) if row.verdict == AS_ACCURATE and row.speedup]
    if not good:
        return f"No policy is shown to be {within}."
    more, most, gain = ("cheaper", "Cheapest", "cheap") if suite.cost == "flops" else ("faster", "Fastest", "fast")
    shown = [(policy, speedup) for policy, speedup in good if speedup.low > 1.0]
    policy, speedup = max(shown or good, key=lambda each: each[1].mean)
    if not shown:
        return f"{policy} is {within}, but no such policy is shown to be {more}."
    interval = f"[{speedup.low:.2f}, {speedup.high:.2f}]"
    return f"{most} of those {within}: {policy}, {speedup.mean:.2f} times as {gain} {interval}."


def _row(results: Results, policy: str, name: str | None, workloads: Sequence[str]) -> Row:
    cells = [results.cell(workload, policy) for workload in workloads]
    trials = [trial for cell in cells for trial in cell.values()]
    accuracies = [[t.accuracy for t in cell.values() if t.accuracy is not None and _done(t)] for cell in cells]
    pairs = [_pairs(results, workload, policy) for workload in workloads]
    axis, is_baseline = results.suite.cost, policy == results.suite.baseline
    difference = None if is_baseline else estimate([_differences(group) for group in pairs])
    speedup = None if is_baseline else geometric([_ratios(group, lambda trial: trial.cost(axis)) for group in pairs])
    flops = geometric([_ratios(group, lambda trial: trial.flops) for group in pairs])
    accuracy, deviation = _mean_and_deviation(accuracies)
    gap = "" if is_baseline else _gap(results, policy, workloads)
    result, reason = _verdict_and_reason(results, policy, workloads, difference, gap)
    return Row(
        workload=name,
        policy=policy,
        accuracy=accuracy,
        accuracy_deviation=deviation,
        difference=difference,
        verdict=result,
        reason=reason,
        gap=gap,
        speedup=speedup,
        flops_share=1 / flops.mean if flops else None,
        policy_share=_policy_share(trials),
        finished=sum(map(_done, trials)),
        diverged=sum(trial.status == "diverged" for trial in trials),
        failed=sum(trial.status == "failed" for trial in trials),
        planned=sum(results.planned(workload, policy) for workload in workloads),
    )


def _done(trial: Trial) -> bool:
    return trial.status == "finished"


def _pairs(results: Results, workload: str, policy: str) -> list[tuple[Trial, Trial]]:
    """(baseline, policy) for each seed with which both finished."""
    rivals = results.cell(workload, results.suite.baseline)
    own = results.cell(workload, policy)
    return [(rivals[seed], own[seed]) for seed in own if seed in rivals and _done(own[seed]) and _done(rivals[seed])]


def _differences(pairs: Sequence[tuple[Trial, Trial]]) -> list[float]:
    both = [(rival.accuracy, own.accuracy) for rival, own in pairs]
    return [own - rival for rival, own in both if own is not None and rival is not None]


def _ratios(pairs: Sequence[tuple[Trial, Trial]], measure: Callable[[Trial], float | None]) -> list[float]:
    """Baseline over policy, where both were measured."""
    both = [(measure(rival), measure(own)) for rival, own in pairs]
    return [rival / own for rival, own in both if rival and own and min(rival, own) > 0]


def _mean_and_deviation(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    filled = [group for group in groups if group]
    if not filled:
        return None, None
    alone = len(groups) == 1 and len(filled[0]) > 1
    return fmean(map(fmean, filled)), stdev(filled[0]) if alone else None


def _policy_share(trials: Sequence[Trial]) -> float | None:
    shares = [t.policy_seconds / t.train_seconds for t in trials if t.policy_seconds is not None and t.train_seconds]
    return fmean(shares) if shares else None


def _gap(results: Results, policy: str, workloads: Sequence[str]) -> str:
    lost = sum(_lost(results, name, policy) for name in workloads)
    if lost:
        return f"{lost} of its trainings diverged or failed where the baseline's finished"
    empty = [name for name in workloads if not _differences(_pairs(results, name, policy))]
    return f"no pair on {', '.join(empty)}" if empty else ""


def _verdict_and_reason(
    results: Results, policy: str, workloads: Sequence[str], difference: Estimate | None, gap: str
) -> tuple[str, str]:
    """The verdict and what kept it from being clear. Averages must not hide what went wrong.

    A policy whose training diverged or failed with a seed with which the baseline's finished is never "as accurate":
    leaving the seed out would reward it. Nor is one that is "less accurate" on one workload, or has no pair there.
    """
    suite = results.suite
    if policy == suite.baseline:
        return BASELINE, ""
    result = verdict(difference, suite.margin)
    if difference is None:
        return CANNOT_TELL, "no seed finished under both this policy and the baseline"
    if gap:
        return LESS_ACCURATE if result == LESS_ACCURATE else CANNOT_TELL, gap
    groups = {name: _differences(_pairs(results, name, policy)) for name in workloads}
    if not difference.bounded:
        return CANNOT_TELL, f"a single pair on {', '.join(name for name, group in groups.items() if len(group) == 1)}"
    worse = [name for name, group in groups.items() if verdict(estimate([group]), suite.margin) == LESS_ACCURATE]
    if worse and result == AS_ACCURATE:
        return CANNOT_TELL, f"less accurate on {', '.join(worse)}"
    return result, ""


def _lost(results: Results, workload: str, policy: str) -> int:
    rivals = results.cell(workload, results.suite.baseline)
    own = results.cell(workload, policy).values()
    return sum(not _done(trial) and trial.seed in rivals and _done(rivals[trial.seed]) for trial in own)

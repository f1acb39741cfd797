"""Intervals with values by hand, verdicts at their edges, and nothing that goes wrong hidden by an average."""

import math
import random

import pytest
from scipy.stats import t as student

from evaluate.analysis.statistics import (
    AS_ACCURATE,
    BASELINE,
    CANNOT_TELL,
    LESS_ACCURATE,
    Estimate,
    cheapest,
    compare,
    estimate,
    geometric,
    overall,
    verdict,
)
from evaluate.trials.records import read_results


def suite(write, trial, accuracies, lost=lambda row: row, **changes):
    """Results of made-up trials with these accuracies: {policy: {workload: [one a seed; None: diverged]}}."""
    rows = [
        trial(workload, policy, seed, accuracy=value) if value is not None else lost(trial(workload, policy, seed))
        for policy, cells in accuracies.items()
        for workload, values in cells.items()
        for seed, value in enumerate(values)
    ]
    return read_results(write(rows, **changes))


def only(rows, policy, workload=None):
    (row,) = [row for row in rows if (row.policy, row.workload) == (policy, workload)]
    return row


def test_the_interval_of_one_group_is_students():
    found = estimate([[0.01, 0.02, 0.03]])
    assert found.mean == pytest.approx(0.02)
    half = 4.302653 * 0.01 / math.sqrt(3)  # t(0.975, 2 degrees of freedom), s = 0.01
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-6)
    assert found.count == 3


def test_groups_weigh_the_same_however_many_values_they_have():
    assert estimate([[0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).mean == 0.5


def test_the_interval_of_two_groups_is_welchs():
    found = estimate([[0.0, 0.02], [0.01, 0.03, 0.05]])
    # s^2 / n / 4 = 0.0002 / 2 / 4 and 0.0004 / 3 / 4; degrees of freedom 49 / 17 by Satterthwaite
    half = student.ppf(0.975, 49 / 17) * math.sqrt(0.0001 / 4 + 0.0004 / 12)
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half))


def test_the_interval_holds_what_it_promises_over_groups_of_unequal_scatter():
    chance = random.Random(1)
    draws = [
        estimate([[chance.gauss(1, 0.1) for _ in range(3)], [chance.gauss(3, 2.0) for _ in range(5)]])
        for _ in range(2000)
    ]
    assert 0.93 <= sum(draw.low <= 2 <= draw.high for draw in draws) / 2000 <= 0.98


def test_a_single_value_gives_no_interval():
    assert not estimate([[0.3]]).bounded
    assert not estimate([[0.3, 0.4], [0.1]]).bounded


def test_values_that_are_all_equal_give_an_interval_without_width():
    assert estimate([[0.25, 0.25]]) == Estimate(0.25, 0.25, 0.25, 2)


def test_empty_groups_are_left_out():
    assert estimate([[], [1.0, 3.0]]).mean == 2.0
    assert estimate([[], []]) is None
    assert geometric([[]]) is None


def test_the_geometric_mean_of_ratios_has_an_interval_on_the_logarithm():
    found = geometric([[1.0, 4.0]])
    assert found.mean == pytest.approx(2.0)
    half = 12.706205 * math.log(4) / 2  # t(0.975, 1), s / sqrt(2) = log(4) / 2
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((math.log(2) - half, math.log(2) + half))
    assert geometric([[2.0]]).low == -math.inf


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.004, 0.001, AS_ACCURATE),
        (-0.005, 0.001, AS_ACCURATE),  # at the margin
        (0.9 - 0.905, 0.0, AS_ACCURATE),  # at the margin, but for the rounding of floats
        (0.001, 0.002, AS_ACCURATE),
        (-0.0051, 0.001, CANNOT_TELL),
        (-0.2, -0.005, CANNOT_TELL),  # at the margin
        (-0.2, -0.0051, LESS_ACCURATE),
        (-math.inf, math.inf, CANNOT_TELL),
    ],
)
def test_verdicts_at_a_margin_of_half_a_point(low, high, expected):
    assert verdict(Estimate((low + high) / 2, low, high, 3), 0.005) == expected


def test_without_any_pair_there_is_no_verdict():
    assert verdict(None, 0.005) == CANNOT_TELL


def test_a_row_is_worked_out_from_pairs(write, trial):
    rows = [
        trial("a", "none", 0, accuracy=0.90, cpu_seconds=100.0, train_seconds=400.0, flops=1000, policy_seconds=0.0),
        trial("a", "none", 1, accuracy=0.80, cpu_seconds=200.0, train_seconds=400.0, flops=1000, policy_seconds=0.0),
        trial("a", "fast", 0, accuracy=0.91, cpu_seconds=50.0, train_seconds=100.0, flops=250, policy_seconds=2.0),
        trial("a", "fast", 1, accuracy=0.79, cpu_seconds=100.0, train_seconds=100.0, flops=250, policy_seconds=4.0),
    ]
    results = read_results(write(rows))
    row = only(compare(results), "fast", "a")
    assert (row.accuracy, row.accuracy_deviation) == pytest.approx((0.85, 0.06 * math.sqrt(2)))
    assert row.difference.mean == pytest.approx(0.0)
    assert row.speedup.mean == pytest.approx(2.0)
    assert row.speedup.low == pytest.approx(2.0)
    assert row.flops_share == pytest.approx(0.25)
    assert row.policy_share == pytest.approx(0.03)
    assert (row.finished, row.planned, row.diverged, row.failed) == (2, 2, 0, 0)
    by_wall_clock = only(compare(read_results(write(rows, cost="train_seconds"))), "fast", "a")
    assert by_wall_clock.speedup.mean == pytest.approx(4.0)


def test_pairing_takes_out_what_seeds_have_in_common(write, trial):
    results = suite(write, trial, {"none": {"a": [0.5, 0.7, 0.9]}, "near": {"a": [0.501, 0.7, 0.899]}})
    assert only(compare(results), "near", "a").verdict == AS_ACCURATE


def test_the_baseline_is_not_compared_with_itself(folder):
    row = only(compare(read_results(folder)), "none")
    assert (row.verdict, row.difference, row.speedup, row.flops_share) == (BASELINE, None, None, 1.0)


def test_one_seed_tells_nothing(write, trial):
    row = only(compare(suite(write, trial, {"none": {"a": [0.9]}, "same": {"a": [0.9]}})), "same", "a")
    assert row.verdict == CANNOT_TELL
    assert row.reason == "a single pair on a"
    assert row.difference.mean == 0.0


def test_the_suite_as_a_whole(folder):
    rows = compare(read_results(folder))
    assert len(rows) == 3 * 5 + 5
    assert only(rows, "smartfrz").verdict == AS_ACCURATE
    assert only(rows, "static 0.5").verdict == LESS_ACCURATE
    mean = sum(only(rows, "smartfrz", name).difference.mean for name in read_results(folder).workloads) / 3
    assert only(rows, "smartfrz").difference.mean == pytest.approx(mean)


def test_a_policy_that_diverges_is_not_called_as_accurate(write, trial, lost):
    accuracies = {"none": {"a": [0.9] * 4}, "risky": {"a": [0.9, 0.9, 0.9, None]}}
    row = only(compare(suite(write, trial, accuracies, lost)), "risky", "a")
    assert row.difference.low == 0.0
    assert (row.verdict, row.diverged, row.finished, row.planned) == (CANNOT_TELL, 1, 3, 4)
    assert "1 of its trainings diverged or failed" in row.reason


def test_a_policy_that_fails_is_not_called_as_accurate(write, trial):
    rows = [trial("a", policy, seed, accuracy=0.9) for policy in ("none", "broken") for seed in range(3)]
    rows[-1] |= {"status": "failed", "accuracy": None, "error": "out of memory"}
    row = only(compare(read_results(write(rows))), "broken", "a")
    assert (row.verdict, row.failed, row.diverged) == (CANNOT_TELL, 1, 0)


def test_diverging_where_the_baseline_does_too_is_not_held_against_a_policy(write, trial, lost):
    accuracies = {"none": {"a": [0.9, 0.9, None]}, "same": {"a": [0.9, 0.9, None]}}
    row = only(compare(suite(write, trial, accuracies, lost)), "same", "a")
    assert (row.verdict, row.diverged, row.difference.count) == (AS_ACCURATE, 1, 2)


def test_a_worse_workload_is_not_averaged_away(write, trial):
    accuracies = {
        "none": {"a": [0.9, 0.9], "b": [0.8, 0.8]},
        "mixed": {"a": [0.96, 0.96], "b": [0.78, 0.78]},
    }
    rows = compare(suite(write, trial, accuracies))
    row = only(rows, "mixed")
    assert row.difference.low == pytest.approx(0.02)
    assert (row.verdict, row.reason) == (CANNOT_TELL, "less accurate on b")
    assert only(rows, "mixed", "a").verdict == AS_ACCURATE


def test_a_workload_without_a_pair_is_not_passed_over(write, trial):
    accuracies = {"none": {"a": [0.9, 0.9], "b": [0.8, 0.8]}, "partial": {"a": [0.9, 0.9]}}
    row = only(compare(suite(write, trial, accuracies)), "partial")
    assert (row.verdict, row.reason, row.finished, row.planned) == (CANNOT_TELL, "no pair on b", 2, 4)


def test_without_a_baseline_nothing_is_compared(write, trial):
    row = only(compare(suite(write, trial, {"fast": {"a": [0.9, 0.9]}}, policies=["none", "fast"])), "fast", "a")
    assert (row.verdict, row.difference, row.speedup) == (CANNOT_TELL, None, None)
    assert row.accuracy == 0.9


@pytest.mark.parametrize("unusable", [None, 0.0, -1.0])
def test_a_cost_that_cannot_be_divided_by_gives_no_speedup(write, trial, unusable):
    rows = [trial("a", "none", 0), trial("a", "fast", 0, cpu_seconds=unusable)]
    assert only(compare(read_results(write(rows))), "fast", "a").speedup is None


def test_with_one_workload_its_rows_are_the_overall_ones(write, trial):
    rows = compare(suite(write, trial, {"none": {"a": [0.9, 0.9]}, "same": {"a": [0.9, 0.9]}}))
    assert [row.workload for row in overall(rows)] == ["a", "a"]


def test_the_headline_names_the_fastest_of_the_accurate(folder, write, trial):
    results = read_results(folder)
    assert cheapest(results, compare(results)).startswith(
        "Fastest of those as accurate as none within 0.5 percentage points: smartfrz, 1.28 times as fast [1.28, 1.29]"
    )
    worse = suite(write, trial, {"none": {"a": [0.9, 0.9]}, "worse": {"a": [0.8, 0.8]}})
    assert (
        cheapest(worse, compare(worse)) == "No policy is shown to be as accurate as none within 0.5 percentage points."
    )


def test_the_headline_claims_no_speed_that_is_not_shown(write, trial):
    rows = [trial("a", policy, seed, accuracy=0.9) for policy in ("none", "same") for seed in range(2)]
    for row, seconds in zip(rows, (100.0, 100.0, 90.0, 101.0), strict=True):
        row["cpu_seconds"] = seconds
    results = read_results(write(rows))
    assert "no such policy is shown to be faster" in cheapest(results, compare(results))


def test_the_headline_passes_over_a_larger_mean_that_is_not_shown(write, trial):
    seconds = {"none": (100.0, 100.0), "wide": (20.0, 90.0), "steady": (70.0, 71.0), "slow": (99.0, 80.0)}
    rows = [
        trial("a", name, seed, accuracy=0.9, cpu_seconds=own[seed]) for name, own in seconds.items() for seed in (0, 1)
    ]
    results = read_results(write(rows))
    found = compare(results)
    assert only(found, "wide", "a").speedup.mean > only(found, "steady", "a").speedup.mean
    assert cheapest(results, found).startswith(
        "Fastest of those as accurate as none within 0.5 percentage points: steady, 1.42 times"
    )


def test_ratios_of_nonsense_do_not_overflow(write, trial):
    assert geometric([[0.0, math.inf]]).mean == pytest.approx(1.0)
    assert geometric([[1e-300], [1e300]]).mean == pytest.approx(1.0)
    wide = geometric([[1e-200, 1e300]])
    assert 0 < wide.low < 1e-200 < 1e300 <= wide.high * 1.001 < math.inf
    rows = [trial("a", name, seed, flops=cost) for seed in (0, 1) for name, cost in (("none", 1e300), ("tiny", 1e-300))]
    row = only(compare(read_results(write(rows, cost="flops"))), "tiny", "a")
    assert row.speedup.mean == pytest.approx(1e300)
    assert row.flops_share == pytest.approx(1e-300)

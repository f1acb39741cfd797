"""Compute multipliers, worked out by hand."""

import math

import pytest

from evaluate.analysis.compute_multiplier import compute_multipliers, flops_on_curve, full_training_lengths
from evaluate.trials.records import read_results

CURVE = [(100, 0.90), (70, 0.88), (50, 0.80)]


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (0.90, (100, 0)),
        (0.88, (70, 0)),
        (0.84, (60, 0)),  # halfway between the two shorter lengths
        (0.895, (92.5, 0)),
        (0.91, (100, 1)),
        (0.70, (50, -1)),
    ],
)
def test_flops_on_a_curve_by_hand(accuracy, expected):
    assert flops_on_curve(CURVE, accuracy) == pytest.approx(expected)


def test_a_length_that_another_one_beats_is_not_on_the_curve():
    assert flops_on_curve([*CURVE, (80, 0.81), (70, 0.85)], 0.84) == pytest.approx((60, 0))
    assert flops_on_curve([*CURVE, (60, 0.95)], 0.92) == pytest.approx((50 + 10 * 0.12 / 0.15, 0))


@pytest.fixture
def suite(write, trial):
    """Results of {label: [(accuracy, FLOPs) a seed]} by workload."""

    def make(**workloads):
        rows = [
            trial(name, label, seed, accuracy=accuracy, flops=flops)
            for name, cells in workloads.items()
            for label, values in cells.items()
            for seed, (accuracy, flops) in enumerate(values)
        ]
        return read_results(write(rows))

    return make


FULL = {"none": [(0.90, 100), (0.92, 100)], "shorter 0.5": [(0.80, 50), (0.82, 50)]}


def test_a_multiplier_with_its_interval_by_hand(suite):
    results = suite(a=FULL | {"fast": [(0.85, 50), (0.89, 50)]})
    assert full_training_lengths(results) == ["none", "shorter 0.5"]
    found = compute_multipliers(results)
    # Means: .86 and .81 full and short, .87 the policy's: 50 + 50 * .06 / .10 = 80 FLOPs for its 50.
    fast = found["a", "fast"]
    assert fast.value.mean == pytest.approx(1.6)
    assert (fast.at_least, fast.at_most) == (False, False)
    # Seed 1 alone: .89 lies at 85 FLOPs; seed 0 alone: .85 at 75. Two seeds: t = 12.7 on one degree of freedom, and the
    # deviation of the pseudo-values, 2 log(1.6) - log(1.7) and 2 log(1.6) - log(1.5), over the square root of two.
    half = 12.7062 * abs(math.log(1.7) - math.log(1.5)) / 2
    assert fast.value.high == pytest.approx(1.6 * math.exp(half), rel=1e-4)
    assert fast.value.low == pytest.approx(1.6 / math.exp(half), rel=1e-4)
    assert found["a", "shorter 0.5"].value.mean == 1
    assert found[None, "fast"] == fast


def test_outside_of_the_curve_it_is_a_bound(suite):
    both = {"better": [(0.95, 80), (0.93, 80)], "worse": [(0.5, 25), (0.5, 25)]}
    found = compute_multipliers(suite(a=FULL | both, b=FULL | {"better": both["worse"], "worse": both["worse"]}))
    assert found["a", "better"].value.mean == pytest.approx(100 / 80)
    assert found["a", "better"].at_least
    assert found["a", "worse"].value.mean == pytest.approx(50 / 25)
    assert found["a", "worse"].at_most
    over_both = found[None, "better"]
    assert over_both.value.mean == pytest.approx(math.sqrt(100 / 80 * 50 / 25))
    assert (over_both.at_least, over_both.at_most) == (True, True)


def test_there_is_none_without_a_second_length_or_with_a_lost_training(suite, write, trial, lost):
    assert compute_multipliers(suite(a={"none": FULL["none"], "fast": [(0.9, 50), (0.9, 50)]})) == {}
    rows = [trial("a", label, seed) for label in ("none", "shorter 0.5", "fast") for seed in (0, 1)]
    rows[-1] = lost(rows[-1])
    assert ("a", "fast") not in compute_multipliers(read_results(write(rows)))
    assert ("a", "fast") in compute_multipliers(read_results(write(rows[:-1])))


def test_training_with_anything_else_changed_is_no_length_of_full_training(write, trial, told):
    config = {"policy": told("shorter 0.5", cache=True)}
    rows = [trial("a", "none", 0), trial("a", "shorter 0.5", 0, config=config)]
    assert full_training_lengths(read_results(write(rows))) == ["none"]


@pytest.mark.parametrize("options", [{"budget": 0.5, "schedule": "linear"}, {"budget": 0.5, "cooldown": 0.2}])
def test_another_end_of_the_schedule_is_a_length_of_full_training(write, trial, told, options):
    config = {"policy": {**told("shorter 0.5"), "options": options}}
    rows = [trial("a", "none", 0), trial("a", "shorter 0.5", 0, config=config)]
    assert full_training_lengths(read_results(write(rows))) == ["none", "shorter 0.5"]

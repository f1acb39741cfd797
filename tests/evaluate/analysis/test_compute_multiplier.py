"""Compute multipliers, worked out by hand."""

import math
from statistics import fmean

import pytest

from evaluate.analysis.compute_multiplier import (
    compute_multipliers,
    flops_on_curve,
    full_training_curve,
    full_training_lengths,
    lengths_not_trained,
    policy_point,
)
from evaluate.analysis.statistics import compare
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
    assert fast.lowest == ("a", pytest.approx(1.6))


THREE = {
    "none": [(0.90, 100), (0.92, 100)],
    "shorter 0.7": [(0.86, 70), (0.88, 70)],
    "stopped 0.4": [(0.70, 40), (0.74, 40)],
}


def test_three_lengths_and_two_seeds_on_paper(suite):
    """A multiplier and its interval, each step of it.

    The means over the two seeds make the curve: 40 FLOPs for .72, 70 for .87, 100 for .91. The policy has .88 for 50
    FLOPs. .88 is a quarter of the way from .87 to .91, at 70 + 30 / 4 = 77.5 FLOPs: the multiplier is 77.5 / 50 = 1.55.

    Without seed 0 the curve is 40: .74, 70: .88, 100: .92, and the policy's .91 is three quarters of the way up: 92.5
    FLOPs, 1.85. Without seed 1 it is 40: .70, 70: .86, 100: .90, and .85 is 15/16 of the way from .70 to .86: 40 + 30 *
    15 / 16 = 68.125 FLOPs, 1.3625.

    The pseudo-values are 2 log 1.55 - log 1.85 and 2 log 1.55 - log 1.3625. They lie d = log 1.85 - log 1.3625 apart,
    so their standard deviation is d / sqrt 2 and their mean's standard error d / 2. With one degree of freedom t is
    12.706, so the interval reaches 12.706 d / 2 to either side of log 1.55.
    """
    found = compute_multipliers(suite(a=THREE | {"fast": [(0.85, 50), (0.91, 50)]}))["a", "fast"]
    assert found.value.mean == pytest.approx(1.55)
    half = 12.7062 * (math.log(1.85) - math.log(1.3625)) / 2
    assert math.log(found.value.high) == pytest.approx(math.log(1.55) + half, rel=1e-4)
    assert math.log(found.value.low) == pytest.approx(math.log(1.55) - half, rel=1e-4)
    assert (found.above, found.below, found.value.count) == ((), (), 2)


def test_the_lowest_of_the_workloads_stands_beside_their_mean(suite):
    """1.55 on one workload, 77.5 / 96.875 = 0.8 on the other: the mean hides that the policy does not pay there."""
    slow = {"fast": [(0.85, 96.875), (0.91, 96.875)]}
    found = compute_multipliers(suite(a=THREE | {"fast": [(0.85, 50), (0.91, 50)]}, b=THREE | slow))[None, "fast"]
    assert found.value.mean == pytest.approx(math.sqrt(1.55 * 0.8))
    assert found.lowest == ("b", pytest.approx(0.8))


def test_a_group_of_workloads_has_its_own_mean(write, trial):
    """On a and b it needs half of the FLOPs, a multiplier of 2, and on c as many: over all the cube root of 4."""
    rows = [
        trial(name, label, seed, accuracy=0.8 if label == "shorter 0.5" else 0.9, flops=flops)
        for name, own in (("a", 500), ("b", 500), ("c", 1000))
        for label, flops in (("none", 1000), ("shorter 0.5", 500), ("fast", own))
        for seed in (0, 1)
    ]
    results = read_results(write(rows, groups={"a": "short", "b": "short", "c": "long"}))
    found = compute_multipliers(results)
    assert found["all of short", "fast"].value.mean == pytest.approx(2)
    assert found["all of long", "fast"].value.mean == pytest.approx(1)
    assert found[None, "fast"].value.mean == pytest.approx(4 ** (1 / 3))
    rows = {row.workload: row for row in compare(results) if row.policy == "fast"}
    assert list(rows) == ["a", "b", "c", "all of short", "all of long", None]
    assert rows["all of short"].flops_share == pytest.approx(0.5)
    # A group that holds every workload is what is over all anyway.
    assert read_results(write([trial("a", "none", 0)], groups={"a": "short"})).groups == {}


def test_the_curve_has_every_length_and_names_those_that_another_beats(suite):
    curve = full_training_curve(suite(a=THREE | {"stopped 0.8": [(0.84, 80), (0.86, 80)]}), "a")
    assert curve is not None
    assert [(point.label, point.flops) for point in curve.points] == [
        ("stopped 0.4", 40),
        ("shorter 0.7", 70),
        ("none", 100),
    ]
    assert [point.label for point in curve.beaten] == ["stopped 0.8"]
    assert curve.flops(0.88) == pytest.approx(77.5)


def test_equal_mean_accuracies_are_equal_though_their_last_bits_differ(suite):
    """Both lengths classify 964 of 1080 samples, and so does the policy: 50 FLOPs are enough, and it takes 60."""
    cells = {"none": ((325, 337, 302), 100), "shorter 0.5": ((330, 315, 319), 50), "fast": ((325, 337, 302), 60)}
    cells["shorter 0.2"] = ((265, 277, 242), 20)
    results = suite(a={label: [(right / 360, flops) for right in counts] for label, (counts, flops) in cells.items()})
    means = {label: fmean(right / 360 for right in counts) for label, (counts, _) in cells.items()}
    assert 0 < means["none"] - means["shorter 0.5"] < 1e-15
    found = compute_multipliers(results)["a", "fast"]
    assert (found.value.mean, found.above, found.below) == (pytest.approx(50 / 60), (), ())
    curve = full_training_curve(results, "a")
    assert curve is not None
    assert [point.label for point in curve.points] == ["shorter 0.2", "shorter 0.5"]


def test_a_length_with_fewer_seeds_than_the_baseline_is_on_no_policys_curve(write, trial):
    """With seed 0 alone a rival would meet a better curve than a policy that has both seeds."""
    cells = FULL | {"shorter 0.4": [(0.90, 40)], "both": [(0.85, 50), (0.87, 50)], "rival": [(0.85, 50)]}
    rows = [
        trial("a", label, seed, accuracy=accuracy, flops=flops)
        for label, values in cells.items()
        for seed, (accuracy, flops) in enumerate(values)
    ]
    results = read_results(write(rows, policy_seeds={"shorter 0.4": [0], "rival": [0]}))
    found = compute_multipliers(results)
    assert found["a", "both"].value.mean == found["a", "rival"].value.mean == pytest.approx(1.5)
    assert lengths_not_trained(results) == []
    curve = full_training_curve(results, "a")
    assert curve is not None
    assert [point.label for point in curve.points] == ["shorter 0.5", "none"]
    # Five points below full training with seed 0, so five below the mean over both. None where a seed was lost.
    point = policy_point(read_results(write(rows, policy_seeds={"rival": [0]})), "a", "rival", curve)
    assert point is not None
    assert (point.flops, point.accuracy) == (pytest.approx(50), pytest.approx(0.91 - 0.05))
    lost = [*rows, trial("a", "rival", 1, status="diverged", accuracy=None)]
    assert policy_point(read_results(write(lost)), "a", "rival", curve) is None


def test_outside_of_the_curve_it_is_a_bound(suite):
    both = {"better": [(0.95, 80), (0.93, 80)], "worse": [(0.5, 25), (0.5, 25)]}
    found = compute_multipliers(suite(a=FULL | both, b=FULL | {"better": both["worse"], "worse": both["worse"]}))
    assert found["a", "better"].value.mean == pytest.approx(100 / 80)
    assert found["a", "better"].at_least
    assert found["a", "worse"].value.mean == pytest.approx(50 / 25)
    assert found["a", "worse"].at_most
    over_both = found[None, "better"]
    assert over_both.value.mean == pytest.approx(math.sqrt(100 / 80 * 50 / 25))
    assert (over_both.above, over_both.below) == (("a",), ("b",))


def test_costs_of_nonsense_overflow_nothing(suite):
    """Costs as far apart as floats go: a multiplier and its interval are still numbers."""
    nonsense = [(0.85, 1e300), (0.89, 50)], [(0.85, 1e-300), (0.89, 50)], [(0.85, 1e-300), (0.89, 1e300)]
    for full in (FULL, {"none": [(0.9, 1e300), (0.92, 100)], "shorter 0.5": [(0.8, 50), (0.82, 1e300)]}):
        for points in nonsense:
            found = compute_multipliers(suite(a=full | {"fast": points}))["a", "fast"]
            assert 0 < found.value.low <= found.value.mean <= found.value.high < math.inf


def test_there_is_none_without_a_second_length_or_with_a_lost_training(suite, write, trial, lost):
    assert compute_multipliers(suite(a={"none": FULL["none"], "fast": [(0.9, 50), (0.9, 50)]})) == {}
    rows = [trial("a", label, seed) for label in ("none", "shorter 0.5", "fast") for seed in (0, 1)]
    rows[-1] = lost(rows[-1])
    assert ("a", "fast") not in compute_multipliers(read_results(write(rows)))
    assert ("a", "fast") in compute_multipliers(read_results(write(rows[:-1])))


@pytest.mark.parametrize(
    "changes",
    [
        {"probe": True},
        {"options": {"budget": 0.5, "schedule": "linear"}},
        {"name": "stopped", "options": {"budget": 0.5, "cooldown": 0.2}},
        {"name": "stopped", "probe": True, "options": {"budget": 0.5, "cooldown": 0.2}},
    ],
)
def test_another_schedule_and_a_probed_head_are_lengths_of_full_training(write, trial, told, changes):
    config = {"policy": told("shorter 0.5, otherwise", **{"cache": False, **changes})}
    del config["policy"]["cache"]
    rows = [trial("a", "none", 0), trial("a", "another", 0, config=config)]
    assert full_training_lengths(read_results(write(rows))) == ["none", "another"]


def test_of_a_random_and_a_probed_head_the_better_one_makes_the_curve(suite, write, trial, told):
    """A probed head has .85 for 52 FLOPs. So .83 is 11/13 of the way from .72 for 40 FLOPs to it: 50.15 FLOPs."""
    rows = [
        trial("a", label, seed, accuracy=accuracy, flops=flops)
        for label, values in THREE.items()
        for seed, (accuracy, flops) in enumerate(values)
    ]
    rows += [
        trial("a", label, seed, accuracy=accuracy, flops=flops, config={"policy": told("shorter 0.5", **changes)})
        for label, accuracy, flops, changes in (
            ("probed", 0.85, 52, {"probe": True}),
            ("fast", 0.83, 40, {"stop": True}),
        )
        for seed in (0, 1)
    ]
    found = compute_multipliers(read_results(write(rows)))["a", "fast"]
    assert found.value.mean == pytest.approx((40 + 12 * 0.11 / 0.13) / 40)


def test_training_with_anything_else_changed_is_no_length_of_full_training(write, trial, told):
    config = {"policy": told("shorter 0.5", cache=True)}
    rows = [trial("a", "none", 0), trial("a", "shorter 0.5", 0, config=config)]
    assert full_training_lengths(read_results(write(rows))) == ["none"]


@pytest.mark.parametrize("options", [{"budget": 0.5, "schedule": "linear"}, {"budget": 0.5, "cooldown": 0.2}])
def test_another_end_of_the_schedule_is_a_length_of_full_training(write, trial, told, options):
    config = {"policy": {**told("shorter 0.5"), "options": options}}
    rows = [trial("a", "none", 0), trial("a", "shorter 0.5", 0, config=config)]
    assert full_training_lengths(read_results(write(rows))) == ["none", "shorter 0.5"]

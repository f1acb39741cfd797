"""Fitting what a prefix costs that freezes before the first step, on runs whose cost is known."""

from dataclasses import replace

import numpy as np
import pytest

from predictor.errors import UsageError
from predictor.model.first_look import FirstLook
from predictor.model.first_prefix import COST_FLOOR, MOST_COST, PrefixModel
from predictor.training.first_prefix import FirstPrefixes, fit_first_prefix, predict_unseen, replay
from predictor.training.thresholds import RISKS


def run(family, number, scale=4.9):
    """A run of ten layers that costs `scale` percentage points times the prefix's share of the gradient."""
    draw = np.random.default_rng([ord(family), number])
    mean = draw.exponential(size=10)
    flat = (1.0,) * 10
    look = FirstLook(8, tuple(mean), flat, flat, flat, flat, flat, (100,) * 10)
    share = mean.cumsum() / mean.sum()
    step_F = np.linspace(1, 0.3, 11)
    return FirstPrefixes(family, family, look, 95 + number, np.arange(1, 11), scale * share, step_F)


RUNS = [run(family, number) for family in "abcd" for number in range(6)]


def test_it_finds_the_rule_that_made_the_costs():
    model, card = fit_first_prefix(RUNS)
    predicted = np.concatenate([model.costs(each.look) for each in RUNS])
    true = np.concatenate([each.cost_F for each in RUNS])
    clear = (true > 5 * COST_FLOOR) & (true < MOST_COST)
    assert predicted[clear] == pytest.approx(true[clear], rel=0.25)
    assert model.weights["gradient"] == pytest.approx(1, abs=0.2)
    assert card["runs"] == 24
    assert model.fewest_steps == card["fewest_steps"] == 95
    assert card["families"] == dict.fromkeys("abcd", 6)


def test_families_left_out_keep_to_their_part_of_the_risk():
    model, card = fit_first_prefix(RUNS)
    assert [risk for risk, _ in model.allowances] == list(RISKS)
    allowed = [cost for _, cost in model.allowances]
    assert allowed == sorted(allowed)
    for row in card["replays"]:
        assert row["points"] <= row["risk"] / 2
    assert card["replays"][-1]["flops"] < card["replays"][0]["flops"] < 1


def test_the_replay_by_hand():
    """Of two families one freezes what its model allows, and pays what that cost; the other may freeze nothing."""
    one, other = run("a", 0), run("c", 0)
    model, _ = fit_first_prefix(RUNS)
    first, second = predict_unseen([one, other], {"a": model, "c": PrefixModel(100.0)})
    assert first.cost_L == pytest.approx(model.costs(one.look))
    allowed = float(first.cost_L[4:6].mean())
    assert first.freezes(allowed) == 5
    # The predictions may be off by half: five factors, evenly spread in their logarithm.
    sizes = [first.freezes(allowed * 1.5**power) for power in (-1, -0.5, 0, 0.5, 1)]
    assert sizes[0] < sizes[2] == 5 < sizes[-1]
    lost, left = replay([first, second], allowed)
    assert lost == pytest.approx(np.mean([one.cost_F[size - 1] for size in sizes]) / 2)
    assert left == pytest.approx((np.mean([one.step_F[size] for size in sizes]) + 1) / 2)
    assert replay([first, second], 0.0) == (0.0, 1.0)


def with_evidence(each, *evidence):
    return replace(each, look=replace(each.look, evidence_L=evidence))


def test_only_what_may_freeze_counts_in_what_may_be_risked():
    """A layer that has learned nothing ends the prefix; runs whose first layer has learned nothing are left out."""
    half = with_evidence(RUNS[0], *[50.0] * 5, *[0.0] * 5)
    (first,) = predict_unseen([half], {"a": PrefixModel(-9.0)})
    assert first.freezes(100.0) == 5

    random = [with_evidence(run(family, 9, scale=40.0), *[0.0] * 10) for family in "abcd"]
    model, card = fit_first_prefix(RUNS + random)
    assert (card["runs"], card["replayed"]) == (28, 24)
    with pytest.raises(UsageError, match="of 4 runs none has a first layer that has learned something"):
        fit_first_prefix(random)
    assert replay(predict_unseen(random, dict.fromkeys("abcd", model)), 100.0) == (0.0, 1.0)


def test_one_family_is_too_few():
    with pytest.raises(UsageError, match="6 runs of 1 families"):
        fit_first_prefix(RUNS[:6])


def test_shorter_trainings_have_the_same_line_and_allowances_of_their_own():
    """Where a prefix costs twice as much, about half of it may be predicted."""
    alone, _ = fit_first_prefix(RUNS)
    short = [replace(each, steps=40 + number, cost_F=2 * each.cost_F) for number, each in enumerate(RUNS)]
    model, card = fit_first_prefix(RUNS, short)
    assert replace(model, shorter=None) == alone
    below = model.shorter
    assert (below.intercept, below.weights) == (model.intercept, model.weights)
    assert below.fewest_steps == card["shorter"]["fewest_steps"] == 40
    for (_, allowed), (_, there), row in zip(
        model.allowances, below.allowances, card["shorter"]["replays"], strict=True
    ):
        assert 0.4 * allowed < there < 0.75 * allowed
        assert row["points"] <= row["risk"] / 2


def test_a_family_of_short_trainings_alone_is_no_part_of_the_line():
    others = [replace(run("e", number), steps=40) for number in range(6)]
    model, card = fit_first_prefix(RUNS, others)
    assert model.shorter.allowances
    assert card["shorter"]["families"] == {"e": 6}


def test_shorter_runs_must_be_shorter():
    with pytest.raises(UsageError, match="shorter runs of up to 100 steps, and others from 95 on"):
        fit_first_prefix(RUNS, RUNS[:6])

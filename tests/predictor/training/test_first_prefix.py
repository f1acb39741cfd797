"""Fitting what a prefix costs that freezes before the first step, on runs whose cost is known."""

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
    allowed = float(first.cost_L[4])
    assert first.freezes(allowed) == 5
    lost, left = replay([first, second], allowed)
    assert lost == pytest.approx(one.cost_F[4] / 2)
    assert left == pytest.approx((one.step_F[5] + 1) / 2)
    assert replay([first, second], 0.0) == (0.0, 1.0)


def test_one_family_is_too_few():
    with pytest.raises(UsageError, match="6 runs of 1 families"):
        fit_first_prefix(RUNS[:6])

"""What a prefix costs that freezes before the first step: the features, the line through them, and the choice."""

import math
from dataclasses import replace

import numpy as np
import pytest

from predictor.errors import UsageError
from predictor.model.first_look import FirstLook
from predictor.model.first_prefix import COST_FLOOR, FEATURES, Planned, PrefixModel, features

LOOK = FirstLook(
    batches=8,
    mean_l1_L=(3.0, 5.0, 9.0),
    noise_l1_L=(2.0, 2.0, 3.0),  # a signal of 1, 3 and 6
    mean_l2_L=(1.0, 1.0, 1.0),
    noise_l2_L=(0.5, 0.5, 0.5),
    weight_l1_L=(10.0, 10.0, 20.0),
    weight_l2_L=(1.0, 1.0, 1.0),
    size_L=(100, 100, 200),
    evidence_L=(10.0, 10.0, 10.0),
)
PLANNED = Planned(steps=50, lr_L=(0.1, 0.1, 0.1), adaptive=False)


def test_features_by_hand():
    known = features(LOOK, PLANNED)
    assert set(known) == set(FEATURES)
    assert np.exp(known["share"]) == pytest.approx([0.1, 0.4, 1.0])
    # 50 steps of 0.1 times the signal, over the weights.
    assert np.exp(known["motion"]) == pytest.approx([5 / 10, 20 / 20, 50 / 40], rel=1e-4)
    assert known["depth"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert np.exp(known["agreement"]) == pytest.approx([1 / 2 + 0.02, 4 / 4 + 0.02, 10 / 7 + 0.02])
    # Under Adam each of the weights moves by the learning rate.
    adaptive = features(LOOK, replace(PLANNED, adaptive=True))
    assert np.exp(adaptive["motion"]) == pytest.approx([500 / 10, 1000 / 20, 2000 / 40], rel=1e-4)
    assert (adaptive["adaptive"] == 1).all()


def test_a_layer_in_which_batches_agree_on_nothing_has_no_share():
    quiet = replace(LOOK, noise_l1_L=(4.0, 2.0, 3.0))
    assert np.exp(features(quiet, PLANNED)["share"])[0] < 1e-5
    assert all(np.isfinite(each).all() for each in features(replace(LOOK, mean_l1_L=(0.0,) * 3), PLANNED).values())


def test_the_choice_by_hand():
    """A cost in proportion to the share of the signal."""
    model = PrefixModel(math.log(2.0), {"share": 1.0}, ((0.5, 0.2), (1.0, 1.0), (2.0, 3.0)))
    assert model.costs(LOOK, PLANNED) + COST_FLOOR == pytest.approx([0.2, 0.8, 2.0])  # costs 0.1, 0.7 and 1.9
    assert [model.choose(LOOK, PLANNED, risk) for risk in (0.5, 0.75, 1.0, 1.5, 2.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("evidence", "learned"),
    [
        ((0.0, 9.0, 9.0), 0),  # the first layer was replaced
        ((9.0, 0.0, 9.0), 3),  # depthwise
        ((9.0, 9.0, 0.0), 3),
        ((9.0, 0.0, 0.0), 1),
        ((0.0, 0.0, 0.0), 0),
        ((), 0),  # not measured
    ],
)
def test_what_has_learned_nothing_does_not_freeze(evidence, learned):
    look = replace(LOOK, evidence_L=evidence)
    assert look.learned == learned
    assert PrefixModel(-20.0, {"share": 1.0}, ((0.5, 10.0),)).choose(look, PLANNED, 0.5) == learned


def test_what_the_user_holds_still_need_not_have_learned():
    held = replace(LOOK, evidence_L=(0.0, 0.0, 9.0), mean_l1_L=(0.0, 0.0, 9.0))
    assert held.learned == 3


def test_where_nothing_is_allowed_nothing_freezes():
    assert PrefixModel(-20.0, {"share": 1.0}).choose(LOOK, PLANNED, 2.0) == 0
    assert PrefixModel(-20.0, {"share": 1.0}, ((0.5, 0.0),)).choose(LOOK, PLANNED, 2.0) == 0


def test_in_a_training_shorter_than_any_that_it_knows_nothing_freezes():
    model = PrefixModel(-20.0, {"share": 1.0}, ((0.5, 10.0),), fewest_steps=PLANNED.steps)
    assert model.choose(LOOK, PLANNED, 0.5) == len(LOOK.size_L)
    assert model.choose(LOOK, replace(PLANNED, steps=PLANNED.steps - 1), 0.5) == 0


def test_it_travels_as_json():
    model = PrefixModel(0.5, {"share": 1.0, "motion": 0.25}, ((0.5, 1.0), (1.0, 2.0)), 220)
    assert PrefixModel.from_dict(model.as_dict()) == model


@pytest.mark.parametrize(
    "change",
    [
        {"intercept": math.nan},
        {"intercept": 10**400},
        {"weights": {"depht": 1.0}},
        {"weights": [1.0]},
        {"allowances": [[1.0, 2.0], [0.5, 1.0]]},
        {"allowances": 3},
        {"allowances": None},
        {"fewest_steps": "many"},
        {"fewest_steps": math.inf},
    ],
)
def test_content_that_is_no_model_is_refused(change):
    content = PrefixModel(0.5, {"share": 1.0}, ((0.5, 1.0),)).as_dict()
    with pytest.raises(UsageError, match="no prefix model"):
        PrefixModel.from_dict({**content, **change})

"""What a prefix costs that freezes before the first step: the features, the line through them, and the choice."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from predictor.errors import UsageError
from predictor.model.file import load_predictor
from predictor.model.first_look import FirstLook
from predictor.model.first_prefix import COST_FLOOR, FEATURES, PrefixModel, features
from predictor.policies.smartfrz import SHIPPED

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
STEPS = 50
MEANS = (3 / 17, 8 / 17, 1.0)
"""Each prefix's share of the gradient."""


def test_features_by_hand():
    known = features(LOOK, STEPS)
    assert set(known) == set(FEATURES)
    assert np.exp(known["gradient"]) == pytest.approx(MEANS)
    assert np.exp(known["depth"]) == pytest.approx([1 / 3, 2 / 3, 1])
    assert np.exp(known["steps"]) == pytest.approx([STEPS] * 3)
    assert np.exp(known["share"]) == pytest.approx([0.1, 0.4, 1.0])
    assert np.exp(known["agreement"]) == pytest.approx([1 / 2 + 0.02, 4 / 4 + 0.02, 10 / 7 + 0.02])


def test_a_layer_without_a_gradient_has_no_share():
    assert np.exp(features(replace(LOOK, mean_l1_L=(0.0, 5.0, 9.0)), STEPS)["gradient"])[0] < 1e-5
    assert np.exp(features(replace(LOOK, noise_l1_L=(4.0, 2.0, 3.0)), STEPS)["share"])[0] < 1e-5
    assert all(np.isfinite(each).all() for each in features(replace(LOOK, mean_l1_L=(0.0,) * 3), STEPS).values())


def test_the_choice_by_hand():
    """A cost in proportion to the share of the gradient."""
    model = PrefixModel(math.log(2.0), {"gradient": 1.0}, ((0.5, 0.3), (1.0, 1.0), (2.0, 3.0)))
    # 0.25, 0.84 and 1.9
    assert model.costs(LOOK, STEPS) + COST_FLOOR == pytest.approx([2 * share for share in MEANS])
    assert [model.choose(LOOK, STEPS, risk) for risk in (0.5, 0.75, 1.0, 1.5, 2.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("name", ["gradient", "share"])
def test_where_no_layer_has_a_gradient_each_prefix_costs_as_much_as_all(name):
    """Nothing is known then, and nothing freezes that would not freeze with all layers."""
    nothing = replace(LOOK, mean_l1_L=(0.0,) * 3)
    model = PrefixModel(math.log(5.0), {name: 1.0}, ((0.5, 1.0),))
    assert model.costs(nothing, STEPS) == pytest.approx([5 - COST_FLOOR] * 3)
    assert model.choose(nothing, STEPS, 0.5) == 0


def deep(mean_l1):
    """A look at as many layers, all of which have learned."""
    ones = (1.0,) * len(mean_l1)
    return FirstLook(8, tuple(mean_l1), ones, ones, ones, ones, ones, (100,) * len(mean_l1), (50.0,) * len(mean_l1))


@pytest.fixture(scope="module")
def shipped():
    return load_predictor(SHIPPED).prefix


def test_behind_a_new_head_of_zeros_the_shipped_one_freezes_nothing(shipped):
    """Then no layer has a gradient."""
    assert [shipped.choose(deep([0.0] * 30), 1000, risk) for risk in (0.1, 0.5, 2.0)] == [0, 0, 0]


def test_the_shipped_one_freezes_more_in_longer_trainings_and_at_higher_risks(shipped):
    look = deep([1.0] * 30)
    chosen = [[shipped.choose(look, steps, risk) for risk in (0.25, 0.5, 1.0)] for steps in (100, 300, 900)]
    assert chosen == sorted(chosen)
    assert all(0 < low < middle < high for low, middle, high in chosen)


def test_layers_that_the_user_holds_still_do_not_count(shipped):
    """As many layers that train, between others or alone, freeze in the same way."""
    rising = [0.5 + 0.1 * number for number in range(20)]
    falling = rising[::-1]
    for means in (rising, falling):
        alone, behind, before = deep(means), deep([0.0] * 10 + means), deep(means + [0.0] * 10)
        assert alone.early_share == behind.early_share == before.early_share
        size = shipped.choose(alone, 300, 0.5)
        assert shipped.choose(before, 300, 0.5) == size
        assert shipped.choose(behind, 300, 0.5) == (10 + size if size else 0)
    assert deep(rising).early_share < 1 < deep(falling).early_share


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
    assert PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 10.0),)).choose(look, STEPS, 0.5) == learned


def test_what_the_user_holds_still_need_not_have_learned():
    held = replace(LOOK, evidence_L=(0.0, 0.0, 9.0), mean_l1_L=(0.0, 0.0, 9.0))
    assert held.learned == 3


def test_what_has_not_settled_does_not_freeze():
    """The first of three layers has 3 of 17 parts of the gradient, then 10 of 24."""
    model = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 10.0),), most_early=1.0)
    assert LOOK.early_share == pytest.approx(3 * 3 / 17)
    assert model.choose(LOOK, STEPS, 0.5) == 3
    restless = replace(LOOK, mean_l1_L=(10.0, 5.0, 9.0))
    assert restless.early_share == pytest.approx(3 * 10 / 24)
    assert model.choose(restless, STEPS, 0.5) == 0
    assert replace(model, most_early=None).choose(restless, STEPS, 0.5) == 3


def test_the_first_tenth_of_many_layers():
    many = replace(LOOK, mean_l1_L=(4.0, 4.0, *[1.0] * 18))
    assert many.early_share == pytest.approx(8 / 26 * 10)
    assert deep([3.0]).early_share == 1
    assert deep([0.0] * 3).early_share == math.inf
    assert deep([2.0, 2.0, *[1.0] * 13]).early_share == pytest.approx(4 / 17 * 15 / 2)


def test_a_longer_training_than_any_that_it_knows_counts_as_the_longest():
    """Twice the steps cost half."""
    model = PrefixModel(math.log(50.0), {"steps": -1.0}, most_steps=100)
    assert model.costs(LOOK, 25)[0] + COST_FLOOR == pytest.approx(2.0)
    assert model.costs(LOOK, 100)[0] + COST_FLOOR == pytest.approx(0.5)
    assert model.costs(LOOK, 1000)[0] == model.costs(LOOK, 100)[0]


def test_where_nothing_is_allowed_nothing_freezes():
    assert PrefixModel(-20.0, {"gradient": 1.0}).choose(LOOK, STEPS, 2.0) == 0
    assert PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 0.0),)).choose(LOOK, STEPS, 2.0) == 0


def test_in_a_training_shorter_than_any_that_it_knows_nothing_freezes():
    model = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 10.0),), fewest_steps=STEPS)
    assert model.choose(LOOK, STEPS, 0.5) == len(LOOK.size_L)
    assert model.choose(LOOK, STEPS - 1, 0.5) == 0


def test_a_shorter_training_has_a_model_of_its_own():
    careful = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 0.0),), fewest_steps=STEPS // 2)
    model = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 10.0),), STEPS, shorter=careful)
    assert model.for_length(STEPS) is model
    assert model.for_length(STEPS - 1) is careful
    assert model.for_length(STEPS // 2 - 1) is None
    assert model.choose(LOOK, STEPS, 0.5) == len(LOOK.size_L)
    assert model.choose(LOOK, STEPS - 1, 0.5) == 0
    eager = replace(model, shorter=replace(careful, allowances=((0.5, 10.0),)))
    assert eager.choose(LOOK, STEPS // 2, 0.5) == len(LOOK.size_L)
    assert eager.choose(LOOK, STEPS // 2 - 1, 0.5) == 0


def test_a_file_of_an_earlier_version_freezes_what_it_froze():
    """By the share of the gradient alone: 3 and 8 of 17 parts, of which it allows .2 and .5 in a short training."""
    short = {"intercept": 0.0, "weights": {"gradient": 1.0}, "allowances": [[0.5, 0.2], [1.0, 0.5]], "fewest_steps": 40}
    content = {**short, "allowances": [[0.5, 0.0], [1.0, 0.2]], "fewest_steps": 100, "shorter": short}
    model = PrefixModel.from_dict(content)
    assert [model.choose(LOOK, 50, risk) for risk in (0.5, 1.0)] == [1, 2]
    assert [model.choose(LOOK, 100, risk) for risk in (0.5, 1.0)] == [0, 1]
    assert model.choose(replace(LOOK, mean_l1_L=(100.0, 1.0, 900.0)), 50, 0.5) == 2  # settled or not
    assert "most_steps" not in model.as_dict()


def test_it_travels_as_json():
    model = PrefixModel(0.5, {"gradient": 1.0, "agreement": 0.25}, ((0.5, 1.0), (1.0, 2.0)), 220)
    assert PrefixModel.from_dict(model.as_dict()) == model
    limited = replace(model, most_steps=990, most_early=1.0)
    assert PrefixModel.from_dict(json.loads(json.dumps(limited.as_dict()))) == limited
    both = replace(model, shorter=replace(model, intercept=1.0, fewest_steps=40))
    assert PrefixModel.from_dict(json.loads(json.dumps(both.as_dict()))) == both


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
        {"most_steps": "many"},
        {"most_steps": [3]},
        {"most_steps": -5},
        {"fewest_steps": 90, "most_steps": 89},
        {"most_early": math.nan},
        {"most_early": "little"},
        {"shorter": 3},
        {"shorter": {"intercept": 0.0}},
        {"shorter": PrefixModel(0.0).as_dict()},  # not shorter
    ],
)
def test_content_that_is_no_model_is_refused(change):
    content = PrefixModel(0.5, {"gradient": 1.0}, ((0.5, 1.0),)).as_dict()
    with pytest.raises(UsageError, match="no prefix model"):
        PrefixModel.from_dict({**content, **change})


RANDOM = replace(LOOK, evidence_L=(0.0,) * 3, unready_L=(False,) * 3)
"""The same gradients in a network from scratch."""


def test_from_scratch_a_model_of_its_own_chooses():
    cheap = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 10.0),), fewest_steps=10, most_steps=100)
    known = PrefixModel(20.0, {"gradient": 1.0}, ((0.5, 10.0),), scratch=cheap)
    assert (known.choose(LOOK, 50, 0.5), known.choose(RANDOM, 50, 0.5)) == (0, 3)
    assert [known.choose(RANDOM, steps, 0.5) for steps in (9, 10, 100, 101)] == [0, 3, 3, 0]
    assert known.choose(replace(RANDOM, unready_L=(False, False, True)), 50, 0.5) == 2
    assert replace(known, scratch=None).choose(RANDOM, 50, 0.5) == 0
    assert replace(known, scratch=replace(cheap, most_steps=None)).choose(RANDOM, 5000, 0.5) == 3
    assert PrefixModel.from_dict(json.loads(json.dumps(known.as_dict()))) == known


@pytest.mark.parametrize(("learned", "layers", "scratch"), [(0, 3, True), (1, 3, False), (1, 10, True), (2, 10, False)])
def test_a_network_is_from_scratch_where_hardly_a_layer_has_learned(learned, layers, scratch):
    """One in a hundred random ones looks as if it had."""
    evidence = (50.0,) * learned + (0.0,) * (layers - learned)
    assert replace(RANDOM, evidence_L=evidence[::-1]).from_scratch is scratch
    assert not replace(RANDOM, evidence_L=()).from_scratch  # not measured

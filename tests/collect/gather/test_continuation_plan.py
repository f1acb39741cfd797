"""The plan of a run's continuations."""

import pytest

from collect.gather.continuation_plan import Choices, Continuation, planned
from predictor.errors import UsageError


def of_kind(plan, kind):
    return [(one.step, one.layers) for one in plan if one.kind == kind]


def test_every_point_has_noise_prefixes_and_the_same_single_layers():
    plan = planned(Choices((0.5, 0.0), (0.25, 0.5, 1.0), 2), 40, 8, seed=3)
    assert plan[0] == Continuation("unfrozen", 0, ())
    assert of_kind(plan, "noise") == [(0, ()), (20, ())]
    assert of_kind(plan, "front") == [(step, tuple(range(count))) for step in (0, 20) for count in (2, 4, 8)]
    singles = of_kind(plan, "single")
    assert [step for step, _ in singles] == [0, 0, 20, 20]
    assert singles[0][1] < singles[1][1]
    assert [layers for _, layers in singles[:2]] == [layers for _, layers in singles[2:]]
    assert len({one.key for one in plan}) == len(plan) == 1 + 2 * 6


def test_another_seed_draws_other_layers():
    drawn = {tuple(of_kind(planned(Choices((0.0,), (), 3), 10, 30, seed), "single")) for seed in range(5)}
    assert len(drawn) == 5


def test_nothing_is_trained_twice_where_a_network_is_small():
    plan = planned(Choices(), 3, 2, seed=0)  # 6 points in 3 steps, prefixes of one and of two layers
    assert [step for step, _ in of_kind(plan, "noise")] == [0, 1, 2]
    assert of_kind(plan, "front")[:2] == [(0, (0,)), (0, (0, 1))]
    assert of_kind(plan, "single") == [(step, (1,)) for step in (0, 1, 2)]  # layer 0 alone is a prefix
    assert of_kind(planned(Choices(), 3, 1, seed=0), "front") == [(step, (0,)) for step in (0, 1, 2)]


def test_choices_survive_json():
    assert Choices.from_dict(Choices((0.1,), (), 0).as_dict()) == Choices((0.1,), (), 0)
    assert Choices.from_dict(Choices().as_dict()) == Choices()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": ()}, "points=: give at least one"),
        ({"points": (0.0, 1.0)}, "points=0,1: give at least one, each from 0 to below 1"),
        ({"points": (-0.1,)}, "points=-0.1"),
        ({"prefixes": (0.0, 0.5)}, "prefixes=0,0.5: give shares of the layers, each above 0"),
        ({"prefixes": (1.5,)}, "prefixes=1.5"),
        ({"singles": -1}, "singles=-1: give a number of layers"),
    ],
)
def test_choices_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        Choices(**options)

"""FLOPs against counts made by hand, and which pattern ruled how many steps."""

import pytest
import torch

from data.sources import load_source
from evaluate.trials.flops import StepFlops, steps_by_pattern
from evaluate.trials.lora import with_lora
from predictor.freezing.event import FreezeEvent
from tests.evaluate import toys

UNIT = 10 * 2 * 64 * 64
"""One product of six_linear: a batch of 10 through 64 x 64 weights, a multiplication and an addition each."""


def counter(workload):
    return StepFlops(workload, load_source(workload.source, train_samples=workload.recipe.train_samples))


@pytest.mark.parametrize(
    ("frozen", "units"),
    [
        (set(), 17),  # 6 forward, 6 for weights, 5 for inputs: the first layer passes nothing on
        ({0, 1, 2}, 11),  # 6 forward, 3 for weights, 2 for inputs
        ({2, 3, 4}, 14),  # a hole: 3 weights spared, all inputs passed through
        ({0, 2, 4}, 13),  # 6 forward, 3 for weights, 4 for inputs
        ({0, 1, 2, 3, 4}, 7),  # forward, and the head's weights
    ],
)
def test_six_equal_layers_counted_by_hand(frozen, units):
    assert counter(toys.six_linear())(frozenset(frozen)) == units * UNIT


@pytest.mark.parametrize(("frozen", "share"), [({0, 1, 2}, 0.647), ({2, 3, 4}, 0.824), ({0, 2, 4}, 0.765)])
def test_shares_that_are_known(frozen, share):
    flops = counter(toys.six_linear())
    assert flops(frozenset(frozen)) / flops(frozenset()) == pytest.approx(share, abs=5e-4)


def test_attention_is_counted_though_the_cpu_fuses_it():
    linear, products, head = 2 * 8 * 8 * 8, 2 * 8 * 8 * 8, 2 * 64 * 10
    # linear: forward, weights. Attention: two products forward, four backward. Head: forward, weights, input.
    assert counter(toys.attention())(frozenset()) == 10 * (2 * linear + 6 * products + 3 * head)


@pytest.mark.parametrize(
    ("frozen", "kept_under", "units"),
    [
        ({0, 1, 2}, {0, 1, 2}, 8),  # 3 of 6 forward, 3 for weights, 2 for inputs
        ({0, 1, 2}, {0}, 10),  # the front has grown from one layer, and begins behind that
        ({0, 1, 3}, {0, 1, 3}, 10),  # 4 forward, 3 for weights, 3 for inputs
        ({0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}, 2),  # the head's forward product and weights
        ({2, 3, 4}, {2, 3, 4}, 14),  # the first layer trains: nothing can be kept
    ],
)
def test_a_step_that_begins_from_kept_features(frozen, kept_under, units):
    assert counter(toys.six_linear())(frozenset(frozen), frozenset(kept_under)) == units * UNIT


@pytest.mark.parametrize(("before", "after"), [({0, 1, 2}, {0, 1, 2, 3}), ({0}, {0, 1, 2, 3})])
def test_a_front_that_has_grown_a_little_or_much_begins_from_the_features_it_has(before, after):
    """6 forward less those before, 2 for weights, 1 for inputs; never the passes in which the cache looks for a cut."""
    assert counter(toys.six_linear())(frozenset(after), frozenset(before)) == (6 - len(before) + 3) * UNIT


def test_the_forward_passes_alone():
    assert counter(toys.six_linear()).forward == 6 * UNIT


def test_where_no_place_to_cut_is_found_a_step_costs_what_it_costs_without():
    flops, front = counter(toys.uncuttable()), frozenset({0})
    assert flops(front, front) == flops(front) > 0


def test_adapters_counted_by_hand():
    # Forward: 6 products and 5 pairs of adapters. The head's weights and input. The inputs of 4 of 5 layers that stand
    # still, the first passing nothing on. 10 matrices of adapters, the inputs of 5 second and of 4 first ones.
    adapter = 10 * 2 * 64 * 4
    flops = counter(with_lora(toys.six_linear(), 4))(frozenset())
    assert flops == (6 + 2 + 4) * UNIT + (10 + 10 + 5 + 4) * adapter


def test_depthwise_convolutions_counted_by_hand():
    """Their weights' gradient costs as much as their forward pass, whatever their groups."""
    depthwise, head = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10
    first = 2 * 9 * 8 * 64  # from one channel to 8
    # The first layer's input wants no gradient.
    assert counter(toys.depthwise())(frozenset()) == 10 * (2 * first + 3 * depthwise + 3 * head)
    assert counter(toys.depthwise())(frozenset({0, 1})) == 10 * (first + depthwise + 2 * head)


def test_a_step_of_several_batches_costs_as_many():
    one, three = (toys.six_linear().with_recipe(accumulate=n) for n in (1, 3))
    assert counter(three)(frozenset()) == 3 * counter(one)(frozenset())


def test_a_pattern_is_counted_once_and_random_numbers_stand_still():
    built = []
    workload = toys.six_linear()
    make = workload.model
    object.__setattr__(workload, "model", lambda source: built.append(1) or make(source))
    flops = counter(workload)
    state = torch.get_rng_state()
    assert flops(frozenset({0})) == flops(frozenset({0}))
    assert len(built) == 1
    assert torch.equal(torch.get_rng_state(), state)


def event(step, frozen):
    return FreezeEvent(step, (), (), tuple(frozen), layers=5)


def test_steps_by_pattern():
    history = [event(0, [0]), event(4, [0, 1]), event(6, [0]), event(10, [0, 1, 2])]
    # Steps 1-4 and 7-10 with {0}, 5-6 with {0, 1}; what froze after the last step ruled none.
    assert steps_by_pattern(history, 10) == {frozenset({0}): 8, frozenset({0, 1}): 2}


def test_steps_by_pattern_without_events():
    assert steps_by_pattern([], 7) == {frozenset(): 7}
    assert steps_by_pattern([], 0) == {}

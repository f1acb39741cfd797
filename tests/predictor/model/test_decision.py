"""How certain a prediction has to be to freeze a prefix, by what the prefix saves."""

import numpy as np
import pytest
import torch
from torch import nn

from predictor import FreezeController, layers_of, make_policy
from predictor.layers.flops import LayerFlops
from predictor.model.decision import largest_prefix, saved_by
from predictor.policies.base import View

SAVED = np.array([0.1, 0.4, 1.0])


def test_the_whole_network_saves_the_whole_step():
    np.testing.assert_allclose(saved_by([1.0, 0.9, 0.6, 0.33]), SAVED)


@pytest.mark.parametrize(
    ("probability", "prefix"),
    [
        ([0.96, 0.4, 0.4], 1),  # .04 of .05
        ([0.94, 0.5, 0.4], 0),  # .06
        ([0.94, 0.81, 0.4], 2),  # its own doubt would not do for the first alone
        ([0.81, 0.94, 0.4], 2),
        ([0.79, 0.99, 0.4], 0),  # a prefix has the probability of its least certain layer
        ([0.5, 0.5, 0.5], 3),
        ([0.49, 1.0, 1.0], 0),
        ([1.0, 1.0, 1.0], 3),
    ],
)
def test_a_prefix_may_have_the_doubt_of_the_threshold_times_what_it_saves(probability, prefix):
    assert largest_prefix(probability, SAVED, 0.5) == prefix


def test_several_thresholds_at_once():
    assert largest_prefix([0.96, 0.8, 0.2], SAVED, [1.0, 0.7, 0.5, 0.2]).tolist() == [0, 0, 2, 3]


def test_a_threshold_of_one_freezes_what_is_certain_alone():
    assert largest_prefix([1.0, 0.999, 0.5], SAVED, 1.0) == 1


RISKS = ((0.5, 0.5), (1.0, 0.2))


def chosen(policy, probability, frozen=frozenset(), flops=None):
    layers = layers_of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    policy._saved_L = None
    view = View(layers, frozen, 1, 12, flops)
    return policy._choose(view, dict(zip(view.active, probability, strict=True)))


def test_smartfrz_weighs_doubt_against_saving_where_its_file_knows_risks(make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(risks=RISKS))
    assert policy.wants_flops
    # Each of three layers is taken to save a third where their FLOPs are not known.
    assert chosen(policy, [0.95, 0.85, 0.4]) == {0, 1}
    assert chosen(policy, [0.82, 0.85, 0.4]) == {0, 1}
    assert chosen(policy, [0.82, 0.6, 0.4]) == set()
    assert chosen(policy, [0.85, 0.4], frozen=frozenset({0})) == {1}
    assert chosen(policy, [0.5, 0.5, 0.5]) == {0, 1, 2}
    # The first layer has most of the FLOPs.
    flops = LayerFlops((90, 5, 5), (0, 0, 0), (90, 5, 5), 1)
    assert chosen(policy, [0.8, 0.4, 0.4]) == set()
    assert chosen(policy, [0.8, 0.4, 0.4], flops=flops) == {0}


def test_smartfrz_weighs_nothing_without_risks_and_where_any_layer_may_freeze(make_predictor_file):
    for policy in (
        make_policy("smartfrz", predictor=make_predictor_file()),
        make_policy("smartfrz", predictor=make_predictor_file(risks=RISKS), prefix=False),
    ):
        assert not policy.wants_flops
        assert chosen(policy, [0.5, 0.5, 0.5]) == {0, 1, 2}
        assert chosen(policy, [0.5, 0.5, 0.4]) == {0, 1}
        assert chosen(policy, [0.49, 0.4, 0.4]) == set()


def test_smartfrz_keeps_the_layers_that_it_weighs_through_a_whole_training(make_predictor_file):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, risks=RISKS))
    controller = FreezeController(model, optimizer, policy, total_steps=12, say=None)
    for _ in range(4):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.view.flops is not None
    assert policy._saved_L[-1] == 1
    assert policy._saved_L[0] == pytest.approx(1 - controller.view.flops.share(frozenset({0})))
    assert controller.frozen == {0, 1, 2}

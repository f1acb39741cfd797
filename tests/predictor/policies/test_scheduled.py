"""The policy "schedule": fronts at given times, and what it refuses."""

import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View


def fronts(policy, layers, steps, total_steps=20):
    with torch.no_grad():
        indices = layers_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers + 1))))
    return [sorted(policy.decide(View(indices, frozenset(), step, total_steps))) for step in steps]


def test_each_prefix_stands_from_its_time_on():
    policy = make_policy("schedule", fronts=[[0.25, 0.5], [0.5, 0.75], [1.0, 1.0]])
    assert fronts(policy, 4, [0, 4, 5, 9, 10, 19, 20]) == [[], [], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_a_prefix_may_stand_from_the_start_and_shrink_again():
    policy = make_policy("schedule", fronts=[[0, 1], [0.5, 0.4]])
    assert policy.unfreezes
    assert not make_policy("schedule", fronts=[[0.5, 0.4], [0.6, 1]]).unfreezes
    assert fronts(policy, 5, [0, 9, 10, 20]) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1], [0, 1]]


def test_without_a_pair_nothing_freezes():
    assert fronts(make_policy("schedule", fronts=[]), 4, [0, 20]) == [[], []]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([[0.5, 0.2], [0.5, 0.4]], "must rise"),
        ([[0.5, 0.2], [0.4, 0.4]], "must rise"),
        ([[0.5, 1.2]], "from 0 to 1"),
        ([[-0.1, 0.2]], "from 0 to 1"),
        ([[0.5]], "give it as"),
        ([0.5, 0.2], "give it as"),
        ([["soon", 0.2]], "give it as"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        make_policy("schedule", fronts=wrong)

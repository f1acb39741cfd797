"""Steps with frozen fronts: what is frozen, and that a given front's outputs are not computed again."""

import itertools

import pytest
import torch

from collect.train import Training
from data.sources import load_source
from evaluate import fronts
from evaluate.fronts import front_costs
from tests.evaluate import toys

CPU = torch.device("cpu")


@pytest.fixture
def small():
    return toys.six_linear(), load_source("digits", train_samples=100)


def test_fronts_of_a_quarter_to_all_layers(small):
    ticks = []
    rows = front_costs(*small, CPU, 2, lambda: ticks.append(1))
    assert [(row.frozen, row.layers) for row in rows] == [(1, 5), (2, 5), (4, 5), (5, 5)]
    # Of 17 products: frozen layers pass nothing on, and need no gradient of their weights.
    assert [row.flops for row in rows] == pytest.approx([15 / 17, 13 / 17, 9 / 17, 7 / 17])
    assert all(row.step.median > 0 and row.suffix.median > 0 for row in rows)
    assert len(ticks) == 2


def test_a_given_front_is_not_computed_and_changes_no_gradient(small):
    batch = next(small[1].batches("train", 10, shuffle=False))
    computed, given = (fronts._frozen_training(*small, CPU, 3) for _ in range(2))
    fronts._replay(given, given.layers[:3], batch)
    fresh = Training(*small, seed=0, device=CPU)
    for training in (computed, given):
        training.model.load_state_dict(fresh.model.state_dict())
        training.optimizer.zero_grad()
        with torch.no_grad():
            training.model[1].weight.zero_()  # all that follows is zero, unless the first layers are not computed
        training.take_step(itertools.repeat(batch))
    assert computed.model[4].weight.grad.abs().max() == 0
    assert given.model[4].weight.grad.abs().max() > 0
    assert given.model[3].weight.grad is None


def test_the_verdict():
    spread = fronts.Spread
    assert fronts.FrontCost("w", 1, 5, spread(1.0, 0.9, 1.1), spread(1, 1, 1), 0.9).holds
    assert not fronts.FrontCost("w", 1, 5, spread(1.01, 0.9, 1.1), spread(1, 1, 1), 0.9).holds

"""Steps with frozen prefixes: that the right things are compared, not how long they took."""

import pytest
import torch
from torch import nn

from collect.workloads import Recipe, Workload
from data.sources import load_source
from evaluate.bench.frozen_prefixes import PrefixCost, counts_of, prefix_costs
from evaluate.bench.suffix import Subject
from evaluate.trials.stopwatch import Spread
from tests.evaluate import toys

CPU = torch.device("cpu")


@pytest.fixture
def small():
    return toys.six_linear(), load_source("digits", train_samples=100)


def test_prefixes_of_a_quarter_to_all_layers(small):
    ticks = []
    rows = prefix_costs(Subject(*small, CPU), 2, lambda: ticks.append(1))
    assert [(row.frozen, row.layers) for row in rows] == [(1, 5), (2, 5), (4, 5), (5, 5)]
    # Of 17 products: frozen layers pass nothing on, and need no gradient of their weights; cached, no output either.
    assert [row.flops_uncached for row in rows] == pytest.approx([15 / 17, 13 / 17, 9 / 17, 7 / 17])
    assert [row.flops_cached for row in rows] == pytest.approx([14 / 17, 11 / 17, 5 / 17, 2 / 17])
    assert [row.cut for row in rows] == ["1", "2", "4", "5"]
    spreads = [(row.cached, row.uncached, row.gain_cached, row.gain_uncached) for row in rows]
    assert all(spread.median > 0 for row in spreads for spread in row)
    assert len(ticks) == 4 * 2


class Centred(nn.Module):
    """Its hidden layer is called on samples less their mean, so that no output is a sample's own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.hidden((x - x.mean(0)).flatten(1)))


def test_a_cache_that_is_off_says_why():
    workload = Workload("centred", "toy", lambda _: Centred(), "digits", Recipe(epochs=1, batch_size=10))
    (row,) = prefix_costs(Subject(workload, load_source("digits", train_samples=100), CPU), 2, lambda: None)
    assert "depend on the other samples" in row.cut
    assert row.flops_cached == row.flops_uncached < 1


def test_one_set_of_samples_in_another_order_each_epoch(small):
    first, second = (Subject(*small, CPU).batches(epoch) for epoch in (0, 1))
    orders = [torch.cat([batch[0] for batch in batches]) for batches in (first, second)]
    assert len(first) == 4
    assert not torch.equal(*orders)
    assert torch.equal(*(order.sort().values for order in orders))


def test_counts_are_distinct_and_not_zero():
    assert counts_of(21) == [5, 10, 16, 21]
    assert counts_of(1) == [1]


@pytest.mark.parametrize(
    ("ratio", "over", "holds"), [(1.05, 0.5, True), (1.06, 0.01, True), (1.06, 0.011, False), (0.9, -0.1, True)]
)
def test_the_verdict(ratio, over, holds):
    def row(cached, uncached):
        spreads = [Spread(value, 0, 9) for value in (cached[0], uncached[0], cached[1], uncached[1], 1, 1)]
        return PrefixCost("w", 1, 5, *spreads, 0.5, 0.7, 1.0, 0.5, "body")

    assert row((ratio, over), (1.0, 0.0)).holds == holds
    assert row((1.0, 0.0), (ratio, over)).holds == holds

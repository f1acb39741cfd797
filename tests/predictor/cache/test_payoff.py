"""A cache that takes longer than the passes that it replaces is switched off, by a clock that the tests turn."""

import pytest
import torch
from torch import nn

from predictor.cache.payoff import Payoff, clock_for
from predictor.cache.store import FeatureStore
from tests.predictor.counted import alike, cached


class Clock:
    """Turned by hand. A moment may not have come yet, as in a GPU's queue."""

    now = 0.0
    arrived = float("inf")

    def mark(self):
        return self.now

    def seconds(self, since, until):
        return until - since if until <= self.arrived else None


class Ticking(nn.Linear):
    """A layer that takes a while."""

    clock: Clock
    seconds = 0.1

    def forward(self, x):
        self.clock.now += self.seconds
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("predictor.cache.feature_cache.clock_for", lambda device: made)
    monkeypatch.setattr(Ticking, "clock", made, raising=False)
    return made


def reading_takes(monkeypatch, clock, seconds):
    """Let reading features take these seconds, the last one for good."""
    fetch, rest = FeatureStore.fetch, list(seconds)

    def slow(self, ids):
        clock.now += rest.pop(0) if len(rest) > 1 else rest[0]
        return fetch(self, ids)

    monkeypatch.setattr(FeatureStore, "fetch", slow)


def trained(passes=60, **options):
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    model = nn.Sequential(Ticking(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    cache = cached(model, layers=1, **options)
    for number in range(passes):
        ids = torch.arange(4) + 4 * (number % 6)
        with cache.batch(ids):
            output = model(x[ids])
        assert alike(output, model(x[ids]))
    return cache


def test_where_reading_takes_longer_than_the_prefix_the_cache_is_off_once_a_second_is_lost(monkeypatch, clock):
    reading_takes(monkeypatch, clock, [0.3])
    cache = trained()
    assert "does not pay" in cache.reason
    assert (cache.hits, cache.bytes) == (32, 0)


@pytest.mark.parametrize("seconds", [[0.01], [5.0, 5.0, 0.01], [0.101]])
def test_a_cache_that_pays_and_a_few_slow_steps_and_a_small_loss_are_left_alone(monkeypatch, clock, seconds):
    reading_takes(monkeypatch, clock, seconds)
    cache = trained()
    assert (cache.reason, cache.hits) == ("", 54)


def test_it_can_be_told_not_to(monkeypatch, clock):
    reading_takes(monkeypatch, clock, [0.3])
    assert trained(adaptive=False).reason == ""


def timed(payoff, clock, seconds, hit, stored=0.0):
    timing = payoff.begin()
    clock.now += seconds
    since = timing.mark()
    clock.now += stored
    timing.stored(since)
    timing.end()
    payoff.add(timing, hit, 1)


def test_what_storing_takes_is_no_part_of_a_pass():
    clock = Clock()
    payoff = Payoff(lambda: clock)
    for _ in range(5):
        timed(payoff, clock, 0.1, hit=False, stored=1.0)
    for _ in range(20):
        timed(payoff, clock, 0.2, hit=True)
    assert "0.2" not in payoff.lost()  # in microseconds
    assert "2e+05" in payoff.lost()
    assert "1e+05" in payoff.lost()
    payoff.forget()
    assert payoff.lost() == ""


def test_nobody_waits_for_a_queue():
    clock = Clock()
    clock.arrived = 0.0
    payoff = Payoff(lambda: clock)
    for hit in [False] * 5 + [True] * 20:
        timed(payoff, clock, 0.2 if hit else 0.1, hit)
    assert payoff.lost() == ""
    clock.arrived = clock.now
    assert payoff.lost()


def test_on_a_device_that_cannot_be_timed_nothing_is_said():
    assert clock_for(torch.device("meta")) is None
    payoff = Payoff(lambda: None)
    payoff.add(payoff.begin(), hit=True, samples=3)
    assert payoff.lost() == ""

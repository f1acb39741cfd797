"""What a step costs with a frozen prefix: against the limit that could be reached, and against the full step."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from collect.training.loop import Training
from data.sources.base import Batch
from evaluate.bench.suffix import Subject, prefix_pass, suffix_training
from evaluate.trials.flops import StepFlops
from evaluate.trials.stopwatch import Spread, busy_seconds, warm_up
from predictor.cache.feature_cache import FeatureCache
from predictor.controller import FreezeController
from predictor.policies import make_policy

LIMIT = 1.05
"""How many times as long as its limit a step with a frozen prefix may take."""
SLACK = 0.01
"""The share of a full step by which it may exceed the limit in any case. Where all layers are frozen the head alone is
left: a full step of 100 ms shrinks to 1 ms, of which Python's own work to find a batch again is more than 5 %."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
_SECONDS = 0.1
"""How long a measurement should at least take."""
_MOST_STEPS = 200
_ENDLESS = 1_000_000
"""Steps of a training that is long enough for every measurement."""


@dataclass(frozen=True)
class PrefixCost:
    """One workload's step with its first layers frozen.

    The limit of a step whose prefix is cached is that of the layers behind the prefix trained alone on ready outputs;
    without a cache, the prefix's pass in evaluation mode without gradients comes on top.
    """

    workload: str
    frozen: int
    layers: int
    cached: Spread
    """The time of a step whose prefix is in the cache, over its limit."""
    uncached: Spread
    """The time of a step that computes the prefix, over its limit."""
    over_cached: Spread
    """By how much the first takes longer than its limit, as a share of the full step."""
    over_uncached: Spread
    """The same of the second."""
    gain_cached: Spread
    """The time of a full step over that of one whose prefix is in the cache."""
    gain_uncached: Spread
    """The time of a full step over that of one that computes the prefix."""
    flops_cached: float
    """FLOPs of a step whose prefix is in the cache over those of the full step."""
    flops_uncached: float
    """The same of a step that computes the prefix."""
    full_seconds: float
    """The time of a full step."""
    limit_seconds: float
    """The time of the limit of a step whose prefix is cached."""
    cut: str
    """The modules whose outputs the cache keeps, or why it keeps none."""

    @property
    def holds(self) -> bool:
        """Whether both steps reach their limit."""
        return self.cached_holds and self.uncached_holds

    @property
    def cached_holds(self) -> bool:
        """Whether a step whose prefix is in the cache reaches its limit."""
        return self.cached.median <= LIMIT or self.over_cached.median <= SLACK

    @property
    def uncached_holds(self) -> bool:
        """Whether a step that computes the prefix reaches its limit."""
        return self.uncached.median <= LIMIT or self.over_uncached.median <= SLACK


@dataclass(frozen=True)
class _Ways:
    """The pieces of work that are compared, each on its own model. Called once, each takes one step."""

    full: Callable[[], None]
    limit: Callable[[], None]
    cached: Callable[[], None]
    uncached: Callable[[], None]
    prefix: Callable[[], None]
    cache: FeatureCache


def counts_of(layers: int) -> list[int]:
    """Prefixes of a quarter, a half, three quarters and all of the layers that may freeze."""
    return sorted({round(share * layers) for share in _SHARES} - {0})


def prefix_costs(subject: Subject, rounds: int, tick: Callable[[], None]) -> list[PrefixCost]:
    """Measure the prefixes of `counts_of`.

    Args:
        subject: What is measured.
        rounds: How often. Each round measures every piece of work once.
        tick: Called after each round of each prefix.
    """
    subject = replace(subject, workload=subject.workload.with_recipe(accumulate=1, augment=False))
    warm_up(subject.workload, subject.source, subject.device)
    full = subject.training()
    counts = counts_of(len(full.layers))
    return [_prefix_cost(subject, full, count, rounds, tick) for count in counts]


def _prefix_cost(subject: Subject, full: Training, count: int, rounds: int, tick: Callable[[], None]) -> PrefixCost:
    device, ways = subject.device, _ways(subject, full, count)
    works = (ways.full, ways.limit, ways.cached, ways.uncached, ways.prefix)
    steps = [_steps(_seconds(work, 1, device)) for work in works]
    rows: list[list[float]] = []
    for _ in range(rounds):
        rows.append([_seconds(work, number, device) for work, number in zip(works, steps, strict=True)])
        tick()
    flops, prefix = StepFlops(subject.workload, subject.source), frozenset(range(count))
    full_flops = flops(frozenset())
    return PrefixCost(
        subject.workload.name,
        count,
        len(full.layers),
        cached=Spread.of([cached / limit for _, limit, cached, _, _ in rows]),
        uncached=Spread.of([uncached / (limit + prefix) for _, limit, _, uncached, prefix in rows]),
        over_cached=Spread.of([(cached - limit) / whole for whole, limit, cached, _, _ in rows]),
        over_uncached=Spread.of([(uncached - limit - prefix) / whole for whole, limit, _, uncached, prefix in rows]),
        gain_cached=Spread.of([whole / cached for whole, _, cached, _, _ in rows]),
        gain_uncached=Spread.of([whole / uncached for whole, _, _, uncached, _ in rows]),
        flops_cached=flops(prefix, kept_under=prefix) / full_flops,
        flops_uncached=flops(prefix) / full_flops,
        full_seconds=Spread.of([whole for whole, *_ in rows]).median,
        limit_seconds=Spread.of([limit for _, limit, *_ in rows]).median,
        cut=", ".join(ways.cache.kept) or ways.cache.reason,
    )


def _ways(subject: Subject, full: Training, count: int) -> _Ways:
    batches = subject.batches(epoch=1)
    cached, uncached = subject.training(), subject.training()
    controllers = _controller(cached, count), _controller(uncached, count)
    cache = FeatureCache(controllers[0])
    cached.around_forward = cache.batch
    fill = _step(cached, subject.batches(epoch=0), controllers[0])
    for _ in batches:
        fill()
    limit = suffix_training(subject, count, batches)
    ways = _Ways(
        _step(full, batches),
        _step(limit, batches),
        _step(cached, batches, controllers[0]),
        _step(uncached, batches, controllers[1]),
        prefix_pass(subject, count, batches),
        cache,
    )
    for work in (ways.full, ways.limit, ways.cached, ways.uncached, ways.prefix):
        work()
    return ways


def _controller(training: Training, count: int) -> FreezeController:
    policy = make_policy("static", layers=count)
    return FreezeController(
        training.model, training.optimizer, policy, total_steps=_ENDLESS, layers=training.layers, say=None
    )


def _step(
    training: Training, batches: Sequence[Batch], controller: FreezeController | None = None
) -> Callable[[], None]:
    """What takes a step on the next of the batches, over and over."""
    endless = itertools.cycle(batches)

    def step() -> None:
        training.take_step(endless)
        if controller is not None:
            controller.step()
        training.optimizer.zero_grad()

    return step


def _steps(seconds: float) -> int:
    """How many steps of that length a measurement has."""
    return min(_MOST_STEPS, math.ceil(_SECONDS / max(seconds, 1e-6)))


def _seconds(work: Callable[[], None], steps: int, device: torch.device) -> float:
    """The mean time of a step."""
    start = busy_seconds(device)
    for _ in range(steps):
        work()
    return (busy_seconds(device) - start) / steps

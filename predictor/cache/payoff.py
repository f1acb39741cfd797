"""Whether a hit is faster than the pass that it replaces."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch

_FEWEST_HITS, _FEWEST_PASSES = 20, 5
"""Hits, and passes without, that are timed before anything is said."""
_KEPT = 200
_MOST_LOST = 1.0
"""Seconds that hits may lose in all, against the passes that they replace."""


class Clock(Protocol):
    """Marks moments, on the processor or in a GPU's queue."""

    def mark(self) -> Any:
        """The present moment."""

    def seconds(self, since: Any, until: Any) -> float | None:
        """Between two moments; None where a GPU has not come to the second one."""


class ProcessorClock:
    """Moments on the processor."""

    def mark(self) -> float:
        """The present moment."""
        return time.perf_counter()

    def seconds(self, since: float, until: float) -> float:
        """Between two moments."""
        return until - since


class CudaClock:
    """Moments in the queue of a GPU."""

    def mark(self) -> torch.cuda.Event:
        """The present moment."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, since: torch.cuda.Event, until: torch.cuda.Event) -> float | None:
        """Between two moments; None where the GPU has not come to the second one."""
        there: bool = until.query()  # type: ignore[no-untyped-call]
        return since.elapsed_time(until) / 1e3 if there else None


def clock_for(device: torch.device) -> Clock | None:
    """What times passes on this device; None where nothing does."""
    if device.type == "cpu":
        return ProcessorClock()
    return CudaClock() if device.type == "cuda" else None


class Payoff:
    """Times hits and passes, and says when hits have lost too much time.

    A hit counts from before its features are read to the end of the model's pass; a pass of the whole model without the
    time in which its features were stored. Their medians a sample are compared once there are enough of both. The cache
    does not pay once hits have lost a second in all: less is not worth a word, and a few slow steps decide nothing.
    """

    def __init__(self, clock: Callable[[], Clock | None]) -> None:
        self._make = clock
        self._clock: Clock | None = None
        self._passes: list[float] = []
        self._hits: list[float] = []
        self._count = 0  # samples in hits
        self._under_way: list[tuple[bool, int, list[tuple[Any, Any]]]] = []

    def begin(self) -> "Timing | None":
        """Begin to time a pass; None where nothing can."""
        self._clock = self._clock or self._make()
        return None if self._clock is None else Timing(self._clock)

    def add(self, timing: "Timing | None", hit: bool, samples: int) -> None:
        """Note a pass that has ended."""
        if timing is not None and timing.spans and samples:
            self._under_way.append((hit, samples, timing.spans))

    def lost(self) -> str:
        """What a hit and a pass take, in words, where hits have lost too much time; else empty."""
        self._settle()
        if len(self._hits) < _FEWEST_HITS or len(self._passes) < _FEWEST_PASSES:
            return ""
        hit, whole = median(self._hits), median(self._passes)
        if (hit - whole) * self._count < _MOST_LOST:
            return ""
        return f"{1e6 * hit:.3g} microseconds a sample with kept features, {1e6 * whole:.3g} without"

    def forget(self) -> None:
        """Begin anew with the hits: the prefix has changed. A pass of the whole model takes what it took."""
        self._hits, self._under_way, self._count = [], [], 0

    def _settle(self) -> None:
        while self._under_way:
            hit, samples, spans = self._under_way[0]
            assert self._clock is not None
            taken = [self._clock.seconds(*span) for span in spans]
            if None in taken:
                return  # a GPU is on its way there
            del self._under_way[0]
            whole, *stored = [each for each in taken if each is not None]
            kept = self._hits if hit else self._passes
            kept.append((whole - sum(stored)) / samples)
            del kept[:-_KEPT]
            self._count += samples if hit else 0


class Timing:
    """One pass that is timed: the whole, and then the parts in which features were stored."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = clock.mark()
        self._parts: list[tuple[Any, Any]] = []
        self.spans: list[tuple[Any, Any]] = []

    def restart(self) -> None:
        """Leave out what was before."""
        self._since = self._clock.mark()

    def stored(self, since: Any) -> None:
        """A part that began then has ended."""
        self._parts.append((since, self._clock.mark()))

    def mark(self) -> Any:
        """The present moment."""
        return self._clock.mark()

    def end(self) -> None:
        """The pass has ended."""
        self.spans = [(self._since, self._clock.mark()), *self._parts]

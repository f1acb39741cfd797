"""How long steps wait between the optimizer's step and the next forward pass, and whether for a DataLoader."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.data import dataloader
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Wait:
    """What the median step was like. An evaluation or a checkpoint between two of them counts for nothing."""

    share: float
    """The share of a step's time before its forward pass. On a GPU, time in which it had nothing to do."""
    loader_share: float
    """The share of that wait which a torch DataLoader took."""
    loader_seen: bool
    """Whether one gave any batch."""


class DataWait:
    """Measures some steps, from one optimizer step to the next.

    On a GPU it records two events a step, which do not wait, and reads all of them at the end with one
    synchronization. The time in a DataLoader is the host's. Other loaders cannot be told from other code.

    Args:
        on_forward: has a function called with the inputs of each forward pass.
        model: the model, by whose device it is measured.
        steps: how many.
    """

    def __init__(
        self,
        on_forward: Callable[[Callable[[tuple[Any, ...], Mapping[str, Any]], None]], RemovableHandle],
        model: nn.Module,
        steps: int,
    ) -> None:
        self.done = False
        """Whether it has been reported, and need not be measured again."""
        self._on_forward = on_forward
        self._model = model
        self._count = steps
        self._handle: RemovableHandle | None = None

    @property
    def running(self) -> bool:
        """Whether steps are measured now."""
        return self._handle is not None

    def start(self) -> None:
        """Measure the steps from the next one on."""
        if self.done:
            return
        self.stop()
        self._now = _clock_of(self._model)
        self._ends: list[Any] = []  # of steps
        self._arrivals: list[Any] = []  # of the first forward pass behind each
        self._host_ends: list[float] = []
        self._host_waits: list[float] = []
        self._loading: list[float] = []  # seconds in DataLoaders before each of those passes
        self._loaded = 0.0
        self._seen = False
        self._handle = self._on_forward(self._arrived)
        _listening.add(self)
        _listen()

    def stop(self) -> None:
        """Stop measuring."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            _listening.discard(self)
            _listen()

    def stepped(self) -> Wait | None:
        """Call after each step. Returns what was measured after the last of them, else None."""
        if self._handle is None:
            return None
        if len(self._arrivals) < len(self._ends):  # a step without a forward pass that could be seen
            self._arrived((), {})
        self._ends.append(self._now())
        self._host_ends.append(time.perf_counter())
        self._loaded = 0.0
        if len(self._ends) <= self._count:
            return None
        self.stop()
        return self._result()

    def _arrived(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(self._arrivals) < len(self._ends):  # the first forward pass of a step; others wait for no data
            self._arrivals.append(self._now())
            self._host_waits.append(time.perf_counter() - self._host_ends[-1])
            self._loading.append(self._loaded)

    def loaded(self, seconds: float) -> None:
        """Called after a DataLoader has given a batch."""
        self._seen = True
        self._loaded += seconds

    def _result(self) -> Wait:
        if not isinstance(self._ends[-1], float):
            self._ends[-1].synchronize()
        wait_seconds = _between(self._ends[:-1], self._arrivals)
        step_seconds = _between(self._ends[:-1], self._ends[1:])
        shares = [loading / max(wait, 1e-9) for loading, wait in zip(self._loading, self._host_waits, strict=True)]
        share = median(wait_seconds) / max(median(step_seconds), 1e-9)
        return Wait(min(max(share, 0.0), 1.0), median(shares), self._seen)


def _clock_of(model: nn.Module) -> Callable[[], Any]:
    """What notes the time on a model's device: an event there, or the host's clock."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    kind: Any = None if device.type == "cpu" else getattr(getattr(torch, device.type, None), "Event", None)
    if kind is None:
        return time.perf_counter

    def now() -> Any:
        event = kind(enable_timing=True)
        event.record()
        return event

    return now


def _between(starts: list[Any], ends: list[Any]) -> list[float]:
    """Seconds from each start to its end. What is behind them was waited for."""
    if isinstance(ends[-1], float):
        return [end - start for start, end in zip(starts, ends, strict=True)]
    return [start.elapsed_time(end) / 1000 for start, end in zip(starts, ends, strict=True)]


_listening: "WeakSet[DataWait]" = WeakSet()
_next = dataloader._BaseDataLoaderIter.__next__


def _timed_next(loader: Any) -> Any:
    """Replaces the `__next__` of PyTorch's DataLoaders while steps are measured."""
    began = time.perf_counter()
    try:
        return _next(loader)
    finally:
        for listener in list(_listening):
            listener.loaded(time.perf_counter() - began)
        if not _listening:  # a training was dropped while it was measured
            _listen()


def _listen() -> None:
    """Time DataLoaders while somebody listens."""
    kind: Any = dataloader._BaseDataLoaderIter
    if kind.__next__ in (_next, _timed_next):  # otherwise somebody else replaced it
        kind.__next__ = _timed_next if _listening else _next

"""What a training costs: the seconds of its steps, the memory at its peak, and ratios of such figures."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from collect.training.device import synchronize
from collect.training.loop import Hook, Training
from collect.workloads import Workload
from data.sources.base import Source

BINS = 50
"""Spans that a training is divided into."""
_WARM_UP_STEPS = 3
_PROCESS = Path("/proc/self")


def warm_up(workload: Workload, source: Source, device: torch.device) -> None:
    """Take a few steps on a model that is thrown away, so that libraries load and choose their kernels untimed.

    Moves the global random generators; a training seeds them anew.
    """
    training = Training(workload, source, seed=0, device=device)
    training.model.train()
    batches = training.batches()
    for _ in range(min(_WARM_UP_STEPS, training.steps_per_epoch)):
        training.take_step(batches)
        training.optimizer.zero_grad()
    synchronize(device)


class Stopwatch(Hook):
    """Reads the training's clock about `BINS` times. Make it the last hook, so that the others' work is in the span."""

    def __init__(self) -> None:
        self.bins: list[dict[str, Any]] = []
        """Rows of step (the last of the span), seconds and cpu_seconds (mean of a step in the span)."""
        self._last = (0, 0.0, 0.0)

    def on_start(self, training: Training) -> None:
        """The first span begins once everything is set up."""
        self._every = -(-training.total_steps // BINS)
        self._last = _now(training)

    def on_step(self, training: Training) -> None:
        """End a span where one is full."""
        if training.step % self._every == 0 or training.step == training.total_steps:
            self._mark(training)

    def on_end(self, training: Training) -> None:
        """End the span in which a training diverged."""
        if training.step > self._last[0]:
            self._mark(training)

    def _mark(self, training: Training) -> None:
        now = _now(training)
        steps, seconds, cpu_seconds = (new - old for new, old in zip(now, self._last, strict=True))
        self.bins.append({"step": training.step, "seconds": seconds / steps, "cpu_seconds": cpu_seconds / steps})
        self._last = now


def _now(training: Training) -> tuple[int, float, float]:
    synchronize(training.device)
    return training.step, training.train_seconds, training.cpu_seconds


def busy_seconds(device: torch.device) -> float:
    """A clock for comparing pieces of work: CPU time on a CPU, where others' work is left out; wall-clock elsewhere."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    low: float
    """The lower quartile."""
    high: float
    """The upper quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The quartiles of at least two values."""
        low, median, high = quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class PeakMemory:
    """The most memory that was in use at once since this was made.

    On CUDA the tensors on the device, as PyTorch's allocator counts them. On a CPU: how far the process's resident
    memory rose above its value at the start, by Linux's count. The peak is reset first; otherwise, in a process that
    has trained before, it would be that of the largest training so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self.note: str | None = None
        """Why there is no figure, where there is none."""
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._reset()

    @property
    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured, for which `note` gives the reason."""
        if self.note is not None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") - self._base

    def _reset(self) -> None:
        if self._device.type != "cpu":
            self.note = f"peak memory is not measured on {self._device.type}"
            return
        with contextlib.suppress(OSError, AttributeError):  # not on every C library
            ctypes.CDLL(None).malloc_trim(0)  # what the process holds but no longer uses would hide the rise
        try:
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
            self._base = _status_bytes("VmRSS")
        except (OSError, KeyError) as error:
            self.note = f"peak memory of one training among several in a process needs Linux's clear_refs: {error}"


def _status_bytes(name: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    rows = dict(line.split(":", 1) for line in lines)
    return int(rows[name].split()[0]) * 1024

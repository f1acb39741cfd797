"""Spans of a training, its peak memory, and that warming up leaves no trace."""

from types import SimpleNamespace

import pytest
import torch

from collect.training.loop import train
from data.sources import load_source
from evaluate.trials import stopwatch
from evaluate.trials.stopwatch import PeakMemory, Spread, Stopwatch, warm_up
from tests.evaluate import toys

CPU = torch.device("cpu")
resettable = pytest.mark.skipif(PeakMemory(CPU).bytes is None, reason="needs Linux's clear_refs")


def watch(total_steps, steps, start=5.0):
    """A stopwatch over a scripted training: step n takes n seconds, and half of that in CPU time."""
    training = SimpleNamespace(
        step=0, total_steps=total_steps, device=CPU, train_seconds=start, cpu_seconds=start / 2, status="running"
    )
    watch = Stopwatch()
    watch.on_start(training)
    for step in range(1, steps + 1):
        training.step = step
        training.train_seconds += step
        training.cpu_seconds += step / 2
        watch.on_step(training)
    watch.on_end(training)
    return watch.bins


def test_spans_hold_the_mean_cost_of_their_steps():
    assert watch(100, 100)[0] == {"step": 2, "seconds": 1.5, "cpu_seconds": 0.75}  # steps 1 and 2, not the set-up
    assert watch(100, 100)[-1] == {"step": 100, "seconds": 99.5, "cpu_seconds": 49.75}


@pytest.mark.parametrize(("total_steps", "spans"), [(3, 3), (50, 50), (51, 26), (1000, 50), (1001, 48)])
def test_about_fifty_spans_that_add_up(total_steps, spans):
    bins = watch(total_steps, total_steps)
    begins = [0, *(row["step"] for row in bins)]
    assert len(bins) == spans
    assert begins[-1] == total_steps
    seconds = sum(row["seconds"] * (row["step"] - begin) for row, begin in zip(bins, begins, strict=False))
    assert seconds == pytest.approx(total_steps * (total_steps + 1) / 2)


def test_a_divergence_ends_the_span_under_way():
    assert [row["step"] for row in watch(100, 5)] == [2, 4, 5]
    assert watch(100, 0) == []


@resettable
def test_peak_memory_is_that_of_this_measurement_alone():
    large = torch.ones(50_000_000)  # 200 MB, from an earlier training
    del large
    memory = PeakMemory(CPU)
    small = torch.ones(10_000_000)  # 40 MB, gone again when it is read
    del small
    assert memory.bytes is not None
    assert 30e6 < memory.bytes < 120e6
    assert memory.note is None


def test_peak_memory_that_cannot_be_measured_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(stopwatch, "_PROCESS", tmp_path / "nothing")
    memory = PeakMemory(CPU)
    assert memory.bytes is None
    assert "clear_refs" in memory.note


def test_warming_up_changes_nothing():
    workload = toys.six_linear()
    source = load_source("digits", train_samples=100)
    cold = train(workload, seed=3, device="cpu", source=source)
    warm_up(workload, source, CPU)
    warm = train(workload, seed=3, device="cpu", source=source)
    assert [row["test_loss"] for row in warm.curve] == [row["test_loss"] for row in cold.curve]


def test_spread_by_hand():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([4.0, 2.0]) == Spread(3.0, 2.5, 3.5)

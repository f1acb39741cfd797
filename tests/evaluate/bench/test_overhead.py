"""Shares of the training time that hooks take: that the right things are measured, not how long they took."""

import pytest
import torch

from collect.training.loop import Hook, Training
from collect.workloads import load_workload
from data.sources import load_source
from evaluate.bench import overhead
from evaluate.bench.overhead import LIMITS, overheads
from predictor.model.sampling import SampleSpec


class Count(Hook):
    def __init__(self):
        self.steps, self.snapshots, self.ends = 0, 0, 0

    def on_step(self, training):
        self.steps += 1
        self.snapshots += SampleSpec().due(training.step, training.total_steps)

    def on_end(self, training):
        self.ends += 1
        assert training.status == "finished"


@pytest.fixture
def small():
    workload = load_workload("mlp-digits")
    return workload, load_source(workload.source)


def test_every_span_has_one_snapshot_and_hooks_run_in_their_own_alone(small, monkeypatch):
    counts = {"first": Count(), "second": Count()}
    monkeypatch.setattr(overhead, "_start_hooks", lambda *_: {name: [hook] for name, hook in counts.items()})
    ticks = []
    rows = overheads(*small, torch.device("cpu"), 3, lambda: ticks.append(1))
    assert [row.hooks for row in rows] == ["first", "second"]
    assert len(ticks) == 3 * 3  # without, first, second
    assert [hook.snapshots for hook in counts.values()] == [3, 3]
    assert [hook.ends for hook in counts.values()] == [1, 1]
    total_steps = Training(*small, seed=0, device=torch.device("cpu")).total_steps
    assert counts["first"].steps == pytest.approx(3 * total_steps / 60, abs=3)


def test_every_limit_is_measured_on_real_hooks(small):
    rows = overheads(*small, torch.device("cpu"), 2, lambda: None)
    assert [(row.workload, row.hooks) for row in rows] == [("mlp-digits", name) for name in LIMITS]
    assert all(0 < row.share.low <= row.share.median <= row.share.high for row in rows)
    assert all(row.ratio.median > 0 for row in rows)


def test_the_policy_is_measured_while_it_predicts(small, monkeypatch):
    training = Training(*small, seed=0, device=torch.device("cpu"))
    training.model.train()
    batches = overhead._endless(training)
    (freezing,) = overhead._start_hooks(training, SampleSpec(), batches)["smartfrz"]
    training.take_step(batches)
    predicted = []
    policy = freezing.controller.policy
    monkeypatch.setattr(policy, "_predict", lambda active: predicted.append(active) or torch.zeros(len(active)))
    for _ in range(-(-training.total_steps // 60)):
        freezing.on_step(training)
    assert len(predicted) == 1
    assert freezing.controller.history == []


def test_the_verdict_is_on_the_median():
    spread = overhead.Spread
    row = overhead.Overhead("w", "smartfrz", share=spread(0.005, 0.001, 0.9), ratio=spread(1, 1, 1))
    assert (row.limit, row.holds) == (0.005, True)
    assert not overhead.Overhead("w", "smartfrz", share=spread(0.0051, 0.001, 0.9), ratio=spread(1, 1, 1)).holds

"""Bytes that a frozen prefix returns, counted by hand."""

import pytest
import torch
from torch import nn

from collect.workloads import load_workload
from data.sources import load_source
from evaluate.bench import memory
from evaluate.bench.memory import Change, PrefixMemory, prefix_memory, saved_bytes, state_bytes
from evaluate.bench.suffix import Subject
from evaluate.trials.stopwatch import PeakMemory
from tests.evaluate import toys

CPU = torch.device("cpu")


def test_what_six_linear_layers_give_back():
    ticks = []
    subject = Subject(toys.six_linear(), load_source("digits", train_samples=100), CPU)
    rows = prefix_memory(subject, lambda: ticks.append(1))
    assert [(row.frozen, row.layers) for row in rows] == [(1, 5), (2, 5), (4, 5), (5, 5)]
    weights = 64 * 64 * 4
    for row in rows:
        left = 6 - row.frozen
        assert row.gradients == row.optimizer == Change(6 * weights, left * weights, left * weights)
        # Each layer saves its input for its weight's gradient, 10 x 64; the loss what it saves in any case.
        assert row.activations.before - row.activations.after == row.frozen * 10 * 64 * 4
        assert row.activations.after == row.activations.limit
        assert row.holds
    assert len(ticks) == 4
    if PeakMemory(CPU).bytes is not None:
        assert all(row.peak_before > 0 for row in rows)


def test_adamw_attention_and_dropout_leave_nothing(monkeypatch):
    monkeypatch.setattr(memory, "counts_of", lambda layers: [layers // 2])
    workload = load_workload("vit-digits")
    rows = prefix_memory(Subject(workload, load_source(workload.source), CPU), lambda: None)
    assert all(row.holds for row in rows)
    assert all(row.optimizer.before > row.optimizer.after for row in rows)


def test_each_storage_counts_once_and_parameters_do_not():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    x = torch.ones(4, 8)
    with saved_bytes(model) as saved:
        y = model(x)
        loss = (y * y[:2].repeat(2, 1)).sum()
    assert sum(saved.values()) == 3 * 4 * 8 * 4  # x; y of three nodes, one of them through a view; the repeated one
    loss.backward()
    assert model[0].weight.grad is not None


def test_bytes_of_an_optimizers_state():
    layer = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    assert state_bytes(optimizer) == 0
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 8 * 8 * 4 + 4  # two moments, and the number of steps


@pytest.mark.parametrize(
    ("gradients", "optimizer", "activations", "holds"),
    [(100, 200, 1010, True), (101, 200, 1000, False), (100, 199, 1000, False), (100, 200, 1011, False)],
)
def test_the_verdict(gradients, optimizer, activations, holds):
    changes = Change(900, gradients, 100), Change(900, optimizer, 200), Change(9000, activations, 1000)
    assert PrefixMemory("w", 1, 5, *changes, None, None, "no peak").holds == holds

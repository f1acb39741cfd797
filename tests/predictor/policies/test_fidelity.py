"""Published rules, written down a second time from their description, must freeze the same layers as ours.

Each is a plain function of the whole record, with numpy and one loop a symbol, and shares no code with the policies.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View


def answers(policy, layers, total_steps, gradients=None, lr=0.1):
    """What a policy has frozen after each step, and its learning rates before each, under these gradients."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers + 1)))
    indices = layers_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    policy.bind(model, optimizer, indices)
    frozen = policy.decide(View(indices, frozenset(), 0, total_steps))
    history, rates = [], []
    for step in range(1, total_steps + 1):
        rates.append({index: lr * f for index, f in policy.rates(View(indices, frozen, step - 1, total_steps)).items()})
        for index, layer in enumerate(indices):
            for number, parameter in enumerate(layer.parameters()):
                known = gradients is not None and index not in frozen
                parameter.grad = torch.from_numpy(gradients[step - 1][index][number].copy()) if known else None
        view = View(indices, frozen, step, total_steps)
        policy.observe(view)
        frozen = policy.decide(view) if policy.due(step, total_steps) else frozen
        history.append(set(frozen))
    return history, rates


def linear_schedule(layers, total_steps, start, level):
    """Composer: nothing until `start` of the training; from there to its end the share grows from 0 to `level`."""
    frozen = []
    for step in range(1, total_steps + 1):
        done = step / total_steps
        share = 0.0 if done <= start else level * (done - start) / (1.0 - start)
        frozen.append({layer for layer in range(layers) if layer < math.floor(share * layers)})
    return frozen


def freezeout(layers, total_steps, power, t0, scaled, rate):
    """FreezeOut: which layers are past their end after each step, and the others' rates before it."""
    ends = [(t0 + (1.0 - t0) * i / layers) ** power for i in range(layers)]
    frozen, rates = [], []
    for step in range(total_steps):
        now = {}
        for i, end in enumerate(ends):
            t = step / total_steps
            if t <= end:
                now[i] = (rate / end if scaled else rate) / 2.0 * (1.0 + math.cos(math.pi * t / end))
        rates.append(now)
        frozen.append({i for i, end in enumerate(ends) if (step + 1) / total_steps > end})
    return frozen, rates


def autofreeze(gradients, intervals, percentile):
    """AutoFreeze: sum an interval's gradients, compare the L1 norm with the last one's, freeze before the changing."""
    steps, layers = len(gradients), len(gradients[0])
    length = steps // intervals
    front, last, frozen = 0, None, []
    for step in range(1, steps + 1):
        if step % length == 0:
            norms = []
            for layer in range(layers):
                record = [gradients[s][layer] for s in range(step - length, step)]
                norms.append(sum(np.abs(sum(parts[n] for parts in record)).sum() for n in range(len(record[0]))))
            if last is not None:
                eta = [abs(last[i] - norms[i]) / last[i] for i in range(front, layers)]
                limit = np.percentile(eta, percentile)
                while eta[0] < limit:
                    eta.pop(0)
                    front += 1
            last = norms
        frozen.append(set(range(front)))
    return frozen


@pytest.mark.parametrize(
    ("layers", "steps", "start", "level"), [(7, 211, 0.5, 1.0), (12, 90, 0.13, 0.8), (3, 17, 0, 1)]
)
def test_linear_freezes_as_composer_describes(layers, steps, start, level):
    ours, _ = answers(make_policy("linear", start=start, level=level), layers, steps)
    assert ours == linear_schedule(layers, steps, start, level)
    assert ours[-1]


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1), ("squared", 2), ("cubic", 3)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("layers", "steps", "t0"), [(9, 157, 0.8), (5, 60, 0.31)])
def test_freezeout_freezes_and_slows_down_as_published(schedule, power, scaled, layers, steps, t0):
    policy = make_policy("freezeout", schedule=schedule, t0=t0, scaled=scaled)
    frozen, rates = answers(policy, layers, steps)
    expected_frozen, expected_rates = freezeout(layers, steps, power, t0, scaled, 0.1)
    assert frozen == expected_frozen
    assert len(frozen[-1]) == layers
    for ours, theirs in zip(rates, expected_rates, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("intervals", "percentile"), [(20, 50), (10, 75), (8, 60)])
def test_autofreeze_freezes_as_published(seed, intervals, percentile):
    draw = np.random.default_rng(seed)
    layers, steps = 8, 120
    # Each layer's gradient has a mean of its own that dies away, and noise.
    means = draw.normal(size=(layers, 3, 3)) + 1
    gradients = [
        [
            (draw.normal(size=(3, 3)) * 0.3 + means[i] * math.exp(-step / (20 + 15 * i)), draw.normal(size=3))
            for i in range(layers)
        ]
        for step in range(steps)
    ]
    gradients = [[[part.astype("f4") for part in parts] for parts in step] for step in gradients]
    ours, _ = answers(make_policy("autofreeze", intervals=intervals, percentile=percentile), layers, steps, gradients)
    assert ours == autofreeze(gradients, intervals, percentile)
    assert ours[-1]

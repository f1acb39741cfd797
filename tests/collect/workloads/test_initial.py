"""Initial weights of a given spread."""

import pytest
import torch
from torch import nn

from collect.workloads.initial import draw_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 5), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(800, 64), nn.Embedding(9, 8))


def test_convolutions_and_linear_layers_are_drawn_anew_and_nothing_else() -> None:
    before, after = network(), network()
    draw_weights(after, 0.02)
    for name in ("0.weight", "3.weight"):
        assert after.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.05)
    old = before.state_dict()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {"0.weight", "3.weight"}


def test_without_a_spread_nothing_is_drawn() -> None:
    model = network()
    state = torch.get_rng_state()
    draw_weights(model, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), network().parameters(), strict=True))

"""A model that was run to see its layers is afterwards what it was before."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import layers_of


class Restless(nn.Module):
    """Draws random numbers, keeps statistics, and does more in `train` than it should."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(1))
        self.switched = 0

    def train(self, mode=True):
        self.switched += 1
        return super().train(mode)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.add_(1)
        self.replaced = self.replaced + 1
        self.register_buffer("added", torch.ones(1))
        noise = random.random() + np.random.rand() + torch.rand(4)
        if len(x) == 1:
            raise RuntimeError("too few")
        return self.head(self.norm(self.body(x + noise)))


@pytest.mark.parametrize("samples", [2, 1])
def test_afterwards_the_model_and_all_random_generators_are_what_they_were(samples):
    model = Restless()
    model.body.eval()
    switched, replaced = model.switched, model.replaced
    modes = [module.training for module in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    if samples == 1:
        with pytest.raises(UsageError, match="too few"):
            layers_of(model, torch.ones(1, 4))
    else:
        assert [layer.name for layer in layers_of(model, torch.ones(2, 4))] == ["body"]
    drawn = random.random(), np.random.rand(), torch.rand(())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))
    assert [module.training for module in model.modules()] == modes
    assert model.switched == switched
    assert model.replaced is replaced
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_cast_for_the_callers_autocast_are_not_found_again_by_the_training():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layers_of(model, torch.ones(2, 4))
        model(torch.ones(2, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

"""A feature cache where layers are left out at random while the model trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.predictor.counted import cached

X = torch.linspace(-1, 1, 16 * 8).reshape(16, 8).sin()
Y = torch.arange(16) % 3


class Block(nn.Module):
    """A layer with a connection around it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Encoder(nn.Module):
    """Leaves out some of its layers while it trains, as encoders with LayerDrop do."""

    def __init__(self, left_out=frozenset):
        super().__init__()
        self.left_out = left_out
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        left_out = self.left_out() if self.training else ()
        for index, layer in enumerate(self.layers):
            if index not in left_out:
                x = layer(x)
        return self.head(x)


def drawn():
    return {index for index in range(6) if torch.rand(()) < 0.1}


@pytest.mark.parametrize("seed", range(2))
def test_the_cache_gives_up_and_no_pass_goes_wrong(seed):
    torch.manual_seed(seed)
    model = Encoder(drawn)
    cache = cached(model, layers=3)
    for _ in range(40):
        with cache.batch(range(16)):
            output = model(X)
        assert output.isfinite().all()
        F.cross_entropy(output, Y).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
    assert "left out" in cache.reason or "other features in training" in cache.reason


def test_a_pass_that_left_out_what_was_to_be_given_is_made_once_more_whole():
    model = Encoder()
    cache = cached(model, layers=3)
    for _ in range(2):
        with cache.batch(range(16)):
            model(X)
    assert (cache.hits, cache.reason) == (1, "")
    model.left_out = lambda: {1, 2}
    with cache.batch(range(16)):
        output = model(X)
    assert torch.equal(output, model(X))
    assert "LayerDrop" in cache.reason
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_pass_gave_that_left_out_a_part_is_not_kept():
    model = Encoder()
    cache = cached(model, layers=3)
    with cache.batch(range(8)):
        model(X[:8])
    assert cache.bytes
    model.left_out = lambda: {0}
    with cache.batch(range(8, 16)):
        model(X[8:])
    assert cache.bytes == 0
    assert "LayerDrop" in cache.reason

"""Which layers are of no use with random weights: tables, closed branches, and those of networks without norms."""

import pytest
import torch
from torch import nn

from predictor import layers_of
from predictor.policies.measuring.unready import CLOSED, Openness


class Positions(nn.Module):
    """Adds a number to each of eight features, as a ViT does to its tokens."""

    def __init__(self, shape=(1, 8)):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(shape))

    def forward(self, x):
        return x + self.table


class Scale(Positions):
    def __init__(self, value):
        super().__init__()
        self.table = nn.Parameter(torch.full((8, 1), value))

    def forward(self, x):
        return x * self.table.flatten()


def closed_norm():
    norm = nn.LayerNorm(8)
    nn.init.zeros_(norm.weight)
    return norm


def zeros(bias=False):
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.bias if bias else linear.weight)
    return linear


def small(spread, bias=True):
    linear = nn.Linear(8, 8, bias=bias)
    nn.init.normal_(linear.weight, std=spread)
    return linear


def unready(*modules):
    """Of the layer between two others that are ready; its norms follow it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), *modules, nn.Linear(8, 8), nn.Linear(8, 3))
    layers = layers_of(model)
    opened = [float(Openness(model).of(layer)) for layer in layers]
    assert opened[0] >= CLOSED or len(layers) == 2  # what has no matrix of its own belongs to the first one
    return min(opened) < CLOSED


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([nn.Linear(8, 8)], False),
        ([zeros()], True),
        ([zeros(bias=True)], False),
        ([small(0.02)], True),  # beside biases of 0.2
        ([small(0.02, bias=False)], False),
        ([small(0.2)], False),
        ([nn.Linear(8, 8), closed_norm()], True),
        ([Scale(1e-5)], True),
        ([Scale(1.0)], False),
        ([Positions()], False),  # one row, which all samples get alike
        ([Positions((4, 8))], True),
    ],
)
def test_layers_by_their_weights(modules, expected):
    assert unready(*modules) is expected


def of_first(model, x):
    return float(Openness(model).of(layers_of(model, x)[0]))


def test_an_embedding_is_a_table_and_a_recurrent_layer_is_none():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    words = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert of_first(words, tokens) == 0

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.norm, self.head = nn.GRU(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.rnn(x)[0]))

    assert of_first(Recurrent(), torch.randn(5, 2, 4)) > CLOSED


def test_attention_is_no_table():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.attention(x, x, x)[0]))

    assert of_first(Attends(), torch.randn(2, 5, 8)) > CLOSED


class Normalize(nn.Module):
    """Of inputs, by numbers that are known before."""

    def forward(self, x):
        return x - 0.5


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8), Normalize()])
def test_in_a_network_without_norms_no_layer_is_ready(norm):
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 3))
    assert (of_first(model, torch.randn(4, 8)) > CLOSED) is not isinstance(norm, Normalize)
    assert of_first(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), torch.randn(4, 8)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_weights_may_be_of_any_type(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    layer = layers_of(model, torch.randn(4, 8))[0]
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    assert float(Openness(model).of(layer)) > CLOSED

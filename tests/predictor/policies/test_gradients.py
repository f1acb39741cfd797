"""Gradients of every kind, measured."""

import math

import pytest
import torch
from torch import nn

from predictor.layers.layer import Layer
from predictor.policies.measuring.gradients import gradient_norms, to_host
from predictor.policies.measuring.layer_rates import group_of_layers


def layer(*parameters):
    return Layer("layer", (), parameters)


def test_a_sparse_gradient_has_the_norm_of_the_dense_one():
    norms = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 3, sparse=sparse)
        embedding(torch.tensor([1, 1, 4])).square().sum().backward()
        norms.append(gradient_norms([layer(embedding.weight)]))
    assert norms[0] == pytest.approx(norms[1])


def test_gradients_of_complex_weights_mixed_precisions_and_no_elements():
    weights = [
        nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, 2, dtype=torch.float64)),
        nn.Parameter(torch.ones(0, 2)),
    ]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    norms = gradient_norms([layer(*weights), layer(weights[3]), layer(nn.Parameter(torch.ones(2)))])
    assert norms.dtype == torch.float32
    assert norms[0] == pytest.approx(math.sqrt(12))
    assert norms[1:].isnan().all()


def test_rows_of_several_devices_come_back_in_their_order():
    rows = [torch.full((2,), float(number)) for number in range(5)]
    assert to_host(rows).tolist() == [[number, number] for number in range(5)]
    assert to_host(rows[:1]).shape == (1, 2)


def test_a_layers_group_is_the_one_that_holds_most_of_it():
    big, small, alone = (nn.Parameter(torch.ones(size)) for size in (5, 2, 3))
    groups = [{"params": [small]}, {"params": [big]}]
    assert group_of_layers([layer(big, small), layer(small, alone), layer(alone)], groups) == [1, 0, None]

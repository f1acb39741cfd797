"""Whether weights have learned anything: random ones of every distribution have not, trained ones have."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn import init

from collect.workloads import load_workload
from data.sources import load_source
from predictor import layers_of
from predictor.layers.layer import Layer
from predictor.model.first_look import LEARNED
from predictor.policies.measuring.learned import evidence_of

DISTRIBUTIONS = {
    "as torch does": lambda weights: init.kaiming_uniform_(weights, a=5**0.5),
    "xavier": init.xavier_normal_,
    "kaiming": functools.partial(init.kaiming_normal_, mode="fan_out"),
    "truncated": functools.partial(init.trunc_normal_, std=0.02),
    "cut at two deviations": functools.partial(init.trunc_normal_, std=1.0),
    "orthogonal": init.orthogonal_,
    "sparse": lambda weights: init.normal_(weights).mul_(torch.rand_like(weights) < 0.4),
    "zeros": init.zeros_,
    "identity": init.eye_,
}


def evidence(weights):
    module = nn.Module()
    module.weight = nn.Parameter(weights)
    return float(evidence_of(Layer("weights", (module,), (module.weight,))))


@pytest.mark.parametrize("shape", [(16, 9), (9, 16), (64, 27), (256, 128), (600, 40)])
@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=list(DISTRIBUTIONS))
def test_random_weights_of_any_distribution_are_not_told_from_random_ones(draw, shape):
    torch.manual_seed(0)
    found = [evidence(draw(torch.empty(shape))) for _ in range(10)]
    assert sum(found) / 10 < 1.5
    assert sum(value > LEARNED for value in found) <= 1


def test_of_random_layers_hardly_one_in_a_hundred_is_taken_for_a_learned_one():
    torch.manual_seed(0)
    found = torch.tensor([evidence(torch.rand(64, 36) - 0.5) for _ in range(300)])
    assert (found > 0).double().mean() == pytest.approx(0.5, abs=0.15)  # less than 0 is said to be 0
    assert float((found > LEARNED).double().mean()) < 0.02


@pytest.mark.parametrize("name", ["resnet20-transfer", "mobilenet-transfer"])
def test_pretrained_first_layers_are_told_and_random_ones_are_not(name):
    workload = load_workload(name)
    model = workload.model(load_source(workload.source, train_samples=10))
    assert float(evidence_of(layers_of(model)[0])) > LEARNED
    torch.manual_seed(0)
    for module in layers_of(model)[0].modules:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    assert float(evidence_of(layers_of(model)[0])) < LEARNED


def test_a_short_training_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
    x, y = torch.randn(200, 20), torch.arange(200) % 2
    x[:, :3] += 2 * y[:, None]
    (layer,) = layers_of(model, x[:2])
    before = float(evidence_of(layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < LEARNED < float(evidence_of(layer))


@pytest.mark.parametrize(
    "weights",
    [torch.zeros(0, 3), torch.ones(5), torch.ones(1, 5), torch.zeros(4, 4), torch.full((4, 4), torch.inf)],
    ids=["none", "one dimension", "one row", "zeros", "infinite"],
)
def test_where_there_is_nothing_to_tell_it_says_0(weights):
    assert evidence(weights) == 0


def test_complex_and_narrow_numbers_and_large_matrices():
    torch.manual_seed(0)
    for dtype in (torch.complex64, torch.bfloat16, torch.float64):
        assert evidence(torch.randn(40, 30, dtype=dtype)) < LEARNED
        assert evidence(torch.randn(40, 30, dtype=dtype) + torch.ones(30, dtype=dtype)) > LEARNED
    low = torch.randn(3000, 2) @ torch.randn(2, 2500)
    assert evidence(torch.randn(3000, 2500)) < LEARNED < evidence(torch.randn(3000, 2500) + low)

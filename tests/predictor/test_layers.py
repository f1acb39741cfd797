"""Which layers a model has."""

import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.freezing.layers import layers_of


def names(model, **options):
    return [layer.name for layer in layers_of(model, **options)]


def test_a_layer_takes_along_what_follows_its_weight_and_the_head_is_none(make_toy):
    model = make_toy()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["body.0", "body.3", "body.8"]
    assert [type(part).__name__ for part in layers[1].modules] == [
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Dropout",
        "Flatten",
    ]
    assert layers[0].size == 4 * 9 + 4 + 4 + 4


def test_every_parameter_outside_the_head_belongs_to_exactly_one_layer(make_toy):
    model = make_toy()
    owned = [id(p) for layer in layers_of(model) for p in layer.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.body.parameters())


def test_norm_before_the_first_weight_goes_to_the_first_layer():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    first = layers_of(model)[0]
    assert [type(part).__name__ for part in first.modules] == ["LayerNorm", "Linear"]


class WithTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.embed = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)


def test_a_containers_own_parameter_goes_to_its_first_layer_and_attention_is_one_layer():
    model = WithTokens()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["embed", "attention"]
    assert any(p is model.position for p in layers[0].parameters())
    assert len(list(layers[1].parameters())) == 4


def test_tied_modules_are_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    assert names(model) == ["0", "1+2"]


def test_what_is_tied_to_the_head_is_no_layer():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    assert names(model) == ["1"]


def test_a_shared_module_counts_once():
    shared = nn.Linear(4, 4)
    assert names(nn.Sequential(shared, shared, nn.Linear(4, 2))) == ["0"]


def test_patterns_make_a_layer_each():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    layers = layers_of(model, patterns=["[01]", "2"])
    assert [layer.name for layer in layers] == ["[01]", "2"]
    assert len(list(layers[0].parameters())) == 4


def test_a_pattern_without_a_match_is_refused_with_its_text():
    with pytest.raises(UsageError, match=r"'blocks\.\*'"):
        layers_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), patterns=["blocks.*"])


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_a_model_without_two_layers_is_refused(model):
    with pytest.raises(UsageError, match="at least one before the head"):
        layers_of(model)

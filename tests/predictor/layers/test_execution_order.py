"""Layers in the order in which a forward pass uses them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor.errors import UsageError
from predictor.freezing.freeze import freeze
from predictor.layers.layer import layers_of
from tests.predictor.frozen_prefixes import check_ends

ONES = torch.ones(2, 4)


def names(model, example, **options):
    return [layer.name for layer in layers_of(model, example, **options)]


def layer_with(layers, parameter):
    return next((layer.name for layer in layers if any(own is parameter for own in layer.own)), None)


class Backwards(nn.Module):
    """Defined from back to front; takes its inputs in several ways."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return self.head(self.norm(self.second(self.first(x * scale + shift))))


def test_the_order_is_that_of_execution_not_of_definition():
    layers = layers_of(Backwards(), ONES)
    assert [layer.name for layer in layers] == ["first", "second"]
    assert [type(module).__name__ for module in layers[1].modules] == ["Linear", "LayerNorm"]


@pytest.mark.parametrize("example", [ONES, (ONES, 2.0), {"x": ONES, "shift": ONES}])
def test_an_example_is_a_tensor_a_tuple_or_a_dict(example):
    assert names(Backwards(), example) == ["first", "second"]


def test_an_example_that_does_not_fit_is_refused_with_what_the_model_says():
    with pytest.raises(UsageError, match=r"Backwards cannot be called .*shapes cannot be multiplied"):
        layers_of(Backwards(), torch.ones(2, 3))


def test_on_the_meta_device_nothing_is_computed():
    with torch.device("meta"):
        assert names(Backwards(), torch.ones(2, 4)) == ["first", "second"]


class Tokens(nn.Module):
    """A vision transformer in small: parameters of containers, attention that calls no child, weights used by name."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mask_token = nn.Parameter(torch.zeros(4))
        self.embed = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))
        self.by_name = nn.Linear(4, 4)
        self.temperature = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 2)

    def forward(self, x_BTC):
        x_BTC = torch.cat([self.class_token.expand(len(x_BTC), -1, -1), self.embed(x_BTC)], dim=1)
        x_BTC = x_BTC + self.attention(x_BTC, x_BTC, x_BTC)[0] * self.scale
        x_BTC = F.linear(x_BTC, self.by_name.weight, self.by_name.bias)
        return self.head(x_BTC[:, 0] + self.class_token[0]) * self.temperature


def test_a_parameter_counts_where_it_is_first_used_however_that_is():
    model = Tokens()
    layers = layers_of(model, torch.ones(2, 3, 4))
    assert [layer.name for layer in layers] == ["embed", "attention", "by_name"]
    assert layer_with(layers, model.class_token) == "embed"
    assert layer_with(layers, model.attention.out_proj.weight) == "attention"
    assert layer_with(layers, model.scale) == "attention"
    assert layer_with(layers, model.temperature) is None  # behind the head


def test_a_containers_parameter_that_is_never_used_goes_to_the_first_layer_inside_it():
    model = Tokens()
    assert layer_with(layers_of(model, torch.ones(2, 3, 4)), model.mask_token) == "embed"


class Auxiliary(nn.Module):
    """A second classifier that runs in training alone, and one dropout for everything."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.first = nn.Linear(4, 4)
        self.auxiliary = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.dropout(self.first(x))
        aside = self.auxiliary(x) if self.training else None
        return self.head(self.dropout(self.second(x))), aside


def test_modules_that_never_run_are_left_out_with_their_parameters():
    model = Auxiliary()
    layers = layers_of(model, ONES)
    assert [layer.name for layer in layers] == ["first", "second"]
    assert not {id(p) for layer in layers for p in layer.own} & {id(p) for p in model.auxiliary.parameters()}


def test_one_dropout_for_all_stays_on_until_all_are_frozen():
    model = Auxiliary()
    first, second = layers_of(model, ONES)
    freeze(first)
    assert model.train().dropout.training
    freeze(second)
    assert not model.train().dropout.training


class TwoHeads(nn.Module):
    """Two answers, and the features that they are made of, which no weights follow either."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        features = self.body(x)
        aside = torch.zeros(len(x), 2)
        aside[:, :] = self.first(features).softmax(dim=-1)
        return {"features": features, "answers": (aside, self.second(features))}


def test_every_head_is_left_out_and_features_that_are_returned_are_none():
    assert names(TwoHeads(), ONES) == ["body.0", "body.2"]


class Language(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5, bias=False) if tie == "module" else None
        if self.out is not None:
            self.out.weight = self.embed.weight

    def forward(self, tokens):
        x = self.last(self.body(self.norm(self.embed(tokens))))
        return F.linear(x, self.embed.weight) if self.out is None else self.out(x)


def test_an_embedding_tied_to_the_head_is_left_out_and_what_follows_it_is_not():
    model = Language("module")
    layers = layers_of(model, torch.tensor([[0, 1]]))
    assert [layer.name for layer in layers] == ["body", "last"]
    assert layer_with(layers, model.norm.weight) == "body"


def test_an_embedding_that_is_the_head_as_well_is_left_out():
    assert "embed" not in names(Language("name"), torch.tensor([[0, 1]]))


class Again(nn.Module):
    """The first module runs again behind the second; the third shares the weight of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.between, self.third = (nn.Linear(4, 4) for _ in range(4))
        self.third.weight = self.second.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.third(self.between(self.first(self.second(self.first(x))))))


def test_of_several_uses_the_first_counts_and_so_the_backward_pass_ends():
    model = Again()
    layers = layers_of(model, ONES)
    assert [layer.name for layer in layers] == ["first", "second+third", "between"]
    check_ends(model, ONES, [layers[:1], layers[:2], layers[:3]])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x_BTC, padding_BT):
        return self.head(self.encoder(x_BTC, src_key_padding_mask=padding_BT))


def test_attention_in_its_fused_form_is_taken_apart():
    padding_BT = torch.tensor([[False, False, True], [False, False, False]])
    parts = [f"encoder.layers.0.{part}" for part in ("self_attn", "linear1", "linear2")]
    assert names(Padded(), (torch.ones(2, 3, 4), padding_BT)) == parts
    assert torch.backends.mha.get_fastpath_enabled()


def test_any_other_model_does_not_run_unasked():
    class Loud(Backwards):
        def forward(self, x):
            raise AssertionError("it ran")

    assert names(Loud(), None) == ["head", "second"]


def test_a_compiled_model_runs_eagerly_and_keeps_its_names():
    model = Backwards()
    model.second.compile(backend="eager")
    wrapped = torch.compile(model, backend="eager")
    assert names(wrapped, ONES) == ["first", "second"]
    assert names(wrapped, ONES, granularity="block") == ["first", "second"]

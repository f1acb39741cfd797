"""Which layers a model has."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import layers_of


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


def test_what_a_pattern_before_has_named_is_not_named_again():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    first, second = layers_of(model, patterns=["0.1", "0*"])
    assert first.modules == (model[0][1],)
    assert second.modules == (model[0][0],)  # not model[0], which would take 0.1 along into evaluation mode
    assert second.own == tuple(model[0][0].parameters())


def test_patterns_that_leave_nothing_to_train_are_refused():
    with pytest.raises(UsageError, match="leave out its head"):
        layers_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), patterns=["*"])


def test_a_layer_that_shares_a_weight_with_what_no_pattern_names_is_refused():
    model = nn.Sequential(OrderedDict(words=nn.Embedding(4, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 4)))
    model.head.weight = model.words.weight
    with pytest.raises(UsageError, match=r"'words' shares a parameter with 'head' \(weight\), which no pattern names"):
        layers_of(model, patterns=["words", "body"])
    assert [layer.name for layer in layers_of(model, patterns=["body"])] == ["body"]


def test_patterns_with_an_example_or_blocks_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="leave out example"):
        layers_of(model, torch.ones(1, 4), patterns=["0"])
    with pytest.raises(UsageError, match="leave out example"):
        layers_of(model, granularity="block", patterns=["0"])


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_a_model_without_two_layers_is_refused(model):
    with pytest.raises(UsageError, match="at least one before the head"):
        layers_of(model)


def test_an_unknown_granularity_is_refused():
    with pytest.raises(UsageError, match="'stage'"):
        layers_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), granularity="stage")


def test_weights_that_are_not_made_yet_are_refused():
    with pytest.raises(UsageError, match="call it with a batch first"):
        layers_of(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


def test_norms_and_scales_start_no_layer_whatever_their_shape():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(1, 1, 4))

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([3, 4]), Scale(), nn.Linear(4, 4), nn.Linear(4, 1))
    assert [(layer.name, len(layer.own)) for layer in layers_of(model)] == [("0", 5), ("3", 2)]


def test_a_head_of_one_output_is_a_head():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 1, 1))
    assert names(model) == ["0", "1"]


def test_parametrized_weights_are_one_layer_with_their_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["0", "1"]
    assert len(layers[1].own) == 3


def test_a_container_within_a_layer_freezes_with_it_and_one_around_several_does_not():
    class Counting(nn.Sequential):
        """Keeps statistics of its own in training."""

    within = Counting(nn.Linear(4, 4), nn.ReLU())
    around = Counting(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second, third = layers_of(nn.Sequential(within, around, nn.Linear(4, 2)))
    assert first.modules == (within, within[0], within[1])
    assert second.modules == (around[0],)
    assert third.modules == (around[1],)
    block = layers_of(Blocks(), granularity="block")[1]
    assert [type(module).__name__ for module in block.modules] == ["Block", "Linear", "Linear"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
        self.neck = Block()
        self.head = nn.Linear(4, 2)


def test_blocks_are_what_stands_in_lists_and_elsewhere_modules_that_are_not_most_of_the_model():
    assert names(Blocks(), granularity="block") == ["embed", "stages.0.0", "stages.0.1", "stages.1.0", "neck"]
    wrapped = nn.ModuleDict({"model": Blocks()})
    assert names(wrapped, granularity="block")[1] == "model.stages.0.0"


def test_a_block_goes_without_what_is_the_head():
    assert [len(layer.own) for layer in layers_of(nn.ModuleList([Block(), Block()]), granularity="block")] == [4, 2]


def test_names_are_those_inside_wrappers(make_toy):
    wrapped = nn.DataParallel(make_toy())
    assert names(wrapped) == names(make_toy())
    assert names(wrapped, patterns=["body.0"]) == ["body.0"]

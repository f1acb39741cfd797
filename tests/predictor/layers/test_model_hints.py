"""Models of timm and Transformers run on an example of their own."""

import pytest
import torch
from torch import nn

from predictor.layers.layer import layers_of
from predictor.layers.model_hints import declared_heads, example_inputs

timm = pytest.importorskip("timm")


def made(name, **options):
    """A tiny model of timm; the oldest timm that works has none of them."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    return timm.create_model(name, **options)


def names(model, *example, **options):
    return [layer.name for layer in layers_of(model, *example, **options)]


def test_a_model_of_timm_is_traced_without_an_example():
    # Its branches are defined one after the other, and exchange what they have in between.
    model = timm.create_model("hrnet_w18_small")
    traced = names(model, torch.rand(1, 3, 64, 64))
    assert names(model) == traced
    assert names(nn.Sequential(model, nn.Linear(1000, 2))) != [f"0.{name}" for name in traced]


def test_its_example_is_of_the_images_that_it_was_made_for():
    vit = made("test_vit", img_size=48, in_chans=1)
    assert next(iter(example_inputs(vit))).shape == (1, 1, 48, 48)
    net = made("test_resnet", in_chans=5).to(torch.bfloat16)
    example = next(iter(example_inputs(net)))
    assert example.shape == (1, 5, 64, 64)
    assert example.dtype == torch.bfloat16


def test_a_failing_example_of_its_own_causes_a_warning_and_the_order_is_that_of_definition():
    model = made("test_resnet")
    model.forward_features = None
    with pytest.warns(UserWarning, match=r"ResNet could not be run.*order of definition.*layers_of\(model, example\)"):
        layers = names(model)
    assert layers[0] == "conv1.0"


def test_the_models_own_groups_are_its_blocks():
    assert names(made("test_resnet"), granularity="block") == [
        "conv1",
        *(f"layer{stage}" for stage in (1, 2, 3, 4)),
    ]
    wrapped = nn.Sequential(made("test_vit", num_classes=0), nn.Linear(64, 2))
    assert names(wrapped, torch.rand(1, 3, 160, 160), granularity="block")[:2] == ["0.patch_embed", "0.blocks.0"]


def test_all_heads_that_a_model_names_are_its_heads():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    assert declared_heads(model) == [model.head, model.head_dist]
    assert declared_heads(nn.Linear(2, 2)) == []


def test_batch_norm_with_an_activation_inside_freezes_with_its_statistics():
    model = made("test_efficientnet")
    first = layers_of(model)[0]
    assert model.bn1 in first.modules
    assert model.bn1.weight is first.own[1]

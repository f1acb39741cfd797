"""Layers of 80 networks of torchvision and timm: all parameters, in order, and prefixes that end the backward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor.layers.layer import layers_of
from tests.predictor.frozen_prefixes import check_ends, check_order, flops, freeze_all, inside, left_out

TORCHVISION = {  # name: (height of the images, names of the head and of what runs in training alone)
    "alexnet": (64, ["classifier.6"]),
    "convnext_tiny": (32, ["classifier.2"]),
    "densenet121": (32, ["classifier"]),
    "efficientnet_b0": (32, ["classifier.1"]),
    "googlenet": (32, ["fc", "aux1", "aux2"]),
    "inception_v3": (299, ["fc", "AuxLogits"]),
    "mnasnet0_5": (32, ["classifier.1"]),
    "mobilenet_v2": (32, ["classifier.1"]),
    "mobilenet_v3_small": (32, ["classifier.3"]),
    "regnet_y_400mf": (32, ["fc"]),
    "resnet18": (32, ["fc"]),
    "segmentation.deeplabv3_mobilenet_v3_large": (64, ["classifier.4", "aux_classifier.4"]),
    "segmentation.lraspp_mobilenet_v3_large": (64, ["classifier.low_classifier", "classifier.high_classifier"]),
    "shufflenet_v2_x0_5": (32, ["fc"]),
    "squeezenet1_1": (32, ["classifier.1"]),
    "swin_t": (32, ["head"]),
    "vgg11": (32, ["classifier.6"]),
    "vit_b_32": (224, ["heads.head"]),
}
LARGE = ("alexnet", "inception_v3", "vgg11", "vit_b_32")
"""Drawing their weights or running them takes a second: they are made on the meta device, which does neither."""
TIMM = {  # name: what it is made with besides; img_size is the height of the images, otherwise 32
    "beit_base_patch16_224": {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "caformer_s18": {},
    "cait_xxs24_224": {"img_size": 32, "depth": 4},
    "coat_lite_tiny": {"img_size": 32},
    "coatnet_nano_cc_224": {"img_size": 64},
    "convit_tiny": {"img_size": 32, "depth": 4},
    "convnextv2_atto": {},
    "cs3darknet_s": {},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 4},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 4},
    "densenet121": {"block_config": (3, 2, 2, 2)},
    "dla46_c": {},
    "dpn48b": {},
    "edgenext_xx_small": {},
    "efficientformerv2_s0": {"img_size": 64},
    "efficientnet_lite0": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64},
    "ese_vovnet19b_slim": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 4},
    "fasternet_t0": {},
    "ghostnet_050": {},
    "gmlp_ti16_224": {"img_size": 32},
    "hiera_tiny_224": {"img_size": 64},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "lambda_resnet26t": {},
    "lcnet_035": {},
    "levit_128s": {"img_size": 64},
    "mambaout_femto": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "pit_ti_224": {"img_size": 64},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "rdnet_tiny": {},
    "regnety_002": {},
    "repghostnet_050": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "resmlp_12_224": {"img_size": 32},
    "resnest14d": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "seresnext26ts": {},
    "shvit_s1": {},
    "skresnet18": {},
    "starnet_s1": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "depths": (2, 2, 2, 2)},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_maxvit": {"img_size": 64},
    "test_nfnet": {},
    "test_resnet": {},
    "test_vit": {"img_size": 32},
    "test_vit_relpos": {"img_size": 32},
    "visformer_tiny": {"img_size": 64},
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "depth": 4},
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 4},
}
COUNTED = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "densenet121", "mobilevit_xxs", "pvt_v2_b0"]


def from_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    family, _, name = name.rpartition(".")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if family:
        options = {"weights_backbone": None, "num_classes": 3} | ({"aux_loss": True} if "deeplab" in name else {})
    with torch.device("meta" if name in LARGE else "cpu"):
        return getattr(getattr(models, family) if family else models, name)(**options)


REGROUPED = ("hiera_tiny_224", "levit_128s", "repvit_m0_9")


def from_timm(name):
    """The model, and images to show it."""
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    if name in REGROUPED and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 20):
        pytest.skip(f"this timm makes {name} otherwise, or groups all of its layers into one or two blocks")
    size = TIMM[name].get("img_size", 32)
    return timm.create_model(name, num_classes=5, **TIMM[name]), torch.rand(2, 3, size, size)


def check(model, images, head):
    """All that must hold; `head` names the parameters that are to be left out."""
    layers, blocks = layers_of(model, images), layers_of(model, images, granularity="block")
    assert left_out(model, layers) == left_out(model, blocks) == head
    assert 2 < len(blocks) <= len(layers)
    check_order(model, images, layers, blocks)
    check_ends(model, images, [blocks[: len(blocks) // 2], layers[: len(layers) * 7 // 8]])


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    size, head = TORCHVISION[name]
    model = from_torchvision(name)
    for part in head[1:]:
        # What runs in training alone trains on, behind the layer that feeds it, and would hide where the prefix ends.
        model.get_submodule(part).requires_grad_(part.lower()[:3] != "aux")
    check(model, torch.rand(2, 3, size, size, device=next(model.parameters()).device), inside(model, *head))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    model, images = from_timm(name)
    own = model.get_classifier()
    heads = nn.ModuleList(own if isinstance(own, tuple | nn.ModuleList) else [own])
    if name == "volo_d1_224":
        heads.append(model.aux_head)  # the other half of its logits, which timm does not name
    held = {id(parameter) for parameter in heads.parameters()}
    check(model, images, {name for name, parameter in model.named_parameters() if id(parameter) in held})


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_step_costs_the_forward_pass_and_the_backward_of_what_is_behind_the_prefix(name, granularity):
    model, images = from_timm(name)
    layers = layers_of(model, images, granularity=granularity)
    whole = least = None
    for count in (0, len(layers) // 2, len(layers)):
        freeze_all(layers[:count])
        front, rest, backward = flops(model, images, lambda logits: F.cross_entropy(logits, torch.tensor([0, 1])))
        # What the forward pass costs, once for the gradients of the weights and once for those of their inputs.
        assert rest <= backward <= 2 * rest
        assert whole in (None, front + rest)
        assert least is None or backward < least
        whole, least = front + rest, backward


def test_a_wrong_order_is_seen():
    model, images = from_timm("test_resnet")
    layers = layers_of(model, images)
    with pytest.raises(AssertionError):
        check_order(model, images, layers[::-1], layers[::-1])
    with pytest.raises(AssertionError):
        check_ends(model, images, [layers[1:3], layers[1:6]])

"""The image networks that papers about freezing train from scratch: SmartFRZ's, and Egeria's ResNet-56. For GPUs.

The SmartFRZ paper's hyperparameters are unknown to us: these are the usual recipes of each network.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from collect.workloads.resnet import ResNet
from data.sources.base import Source
from predictor.errors import UsageError

_SMALL = 64
"""Images below this height get the stem that is usual for CIFAR, which keeps their resolution."""


def resnet50(source: Source) -> nn.Module:
    """Torchvision's ResNet-50. Small images get a 3x3 stem of stride 1 without pooling."""
    model: nn.Module = _package("torchvision.models").resnet50(num_classes=source.classes)
    if _small(source):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def vgg11(source: Source) -> nn.Module:
    """Torchvision's VGG-11 with BatchNorm. Small images get one linear layer after the convolutions."""
    model: nn.Module = _package("torchvision.models").vgg11_bn(num_classes=source.classes)
    if _small(source):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, source.classes)
    return model


def mobilenetv2(source: Source) -> nn.Module:
    """Torchvision's MobileNetV2. Small images are not halved by the first two strides."""
    model: nn.Module = _package("torchvision.models").mobilenet_v2(num_classes=source.classes)
    if _small(source):
        for name in ("features.0.0", "features.2.conv.1.0"):
            convolution = model.get_submodule(name)
            convolution.stride = (1, 1)  # type: ignore[assignment]
    return model


def deit_tiny(source: Source) -> nn.Module:
    """Timm's DeiT-Tiny without distillation, for images of the source's size. Small ones get patches of 4x4."""
    timm = _package("timm")
    size = image_shape(source)[1:]
    patch = 4 if _small(source) else 16
    model: nn.Module = timm.create_model(
        "deit_tiny_patch16_224", num_classes=source.classes, img_size=size, patch_size=patch
    )
    return model


_MODELS: dict[str, tuple[str, Callable[[Source], nn.Module]]] = {
    "resnet56": ("resnet", partial(ResNet, blocks=9, width=16)),
    "resnet50": ("resnet", resnet50),
    "vgg11": ("vgg", vgg11),
    "mobilenetv2": ("mobilenet", mobilenetv2),
    "deit-tiny": ("vit", deit_tiny),
}
_CIFAR = {
    "resnet56": Recipe(epochs=200, batch_size=128, lr=0.1, warmup=0.025, augment=True),
    "resnet50": Recipe(epochs=200, batch_size=128, lr=0.1, warmup=0.025, augment=True),
    "vgg11": Recipe(epochs=200, batch_size=128, lr=0.05, warmup=0.025, augment=True),
    "mobilenetv2": Recipe(epochs=200, batch_size=128, lr=0.1, warmup=0.025, augment=True),
    "deit-tiny": Recipe(
        epochs=200,
        batch_size=128,
        optimizer="adamw",
        lr=5e-4,
        weight_decay=0.05,
        warmup=0.05,
        label_smoothing=0.1,
        clip_norm=1.0,
        augment=True,
    ),
}
_FOLDER = {
    "resnet50": Recipe(
        epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, warmup=0.055, label_smoothing=0.1, augment=True
    ),
    "vgg11": Recipe(epochs=90, batch_size=256, lr=0.05, weight_decay=1e-4, warmup=0.055, augment=True),
    "mobilenetv2": Recipe(epochs=150, batch_size=256, lr=0.05, weight_decay=4e-5, warmup=0.033, augment=True),
    "deit-tiny": Recipe(
        epochs=300,
        batch_size=256,
        accumulate=4,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        warmup=0.017,
        label_smoothing=0.1,
        clip_norm=1.0,
        augment=True,
    ),
}


def on_cifar(model: str, source: str) -> Workload:
    """Return one of the networks on "cifar10" or "cifar100"."""
    family, build = _MODELS[model]
    return Workload(f"{model}-{source}", family, build, source, _CIFAR[model], f"{model} on {source}; needs a GPU")


def on_folder(model: str) -> Workload:
    """Return a network on a folder of larger images: `load_workload("resnet50-imagefolder:/data/imagenet")`."""
    family, build = _MODELS[model]
    doc = f"{model} on a folder of images, named after a colon; needs a GPU"
    return Workload(f"{model}-imagefolder", family, build, "imagefolder", _FOLDER[model], doc)


def _small(source: Source) -> bool:
    return image_shape(source)[1] < _SMALL


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        raise UsageError(f"this workload's network comes from {package}: pip install {package}") from error

"""Small networks in the manner of VGG: stages of plain 3x3 convolutions with pooling between them."""

from collections.abc import Sequence

from torch import nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class Vgg(nn.Sequential):
    """Stages of `depth` convolutions, each with BatchNorm and ReLU; each stage but the last halves the image."""

    def __init__(self, source: Source, widths: Sequence[int], depth: int = 2) -> None:
        modules: list[nn.Module] = []
        channels = image_shape(source)[0]
        for stage, width in enumerate(widths):
            if stage:
                modules.append(nn.MaxPool2d(2))
            for inputs in (channels, *[width] * (depth - 1)):
                modules += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, source.classes))


def vgg_fashion() -> Workload:
    """Six convolutions of 16 to 64 channels on Fashion-MNIST; about 2 minutes."""
    recipe = Recipe(epochs=10, lr=0.1)
    return Workload("vgg-fashion", "vgg", lambda source: Vgg(source, (16, 32, 64)), "fashion", recipe)


def vgg_digits() -> Workload:
    """Six convolutions of 16 to 64 channels on digits; about 4 seconds."""
    recipe = Recipe(epochs=10, batch_size=32, lr=0.05)
    return Workload("vgg-digits", "vgg", lambda source: Vgg(source, (16, 32, 64)), "digits", recipe)

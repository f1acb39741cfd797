"""Small networks in the manner of DenseNet (Huang et al., 2017): every layer sees the outputs of all before it."""

import torch
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose output is set beside the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> the same with `growth` more channels."""
        return torch.cat([x_BCHW, self.conv(torch.relu(self.norm(x_BCHW)))], dim=1)


class DenseNet(nn.Sequential):
    """A stem, three dense blocks, and the head. Between blocks, channels and image are halved."""

    def __init__(self, source: Source, layers: int, growth: int, stem_stride: int) -> None:
        channels = 2 * growth
        modules: list[nn.Module] = [nn.Conv2d(image_shape(source)[0], channels, 3, stem_stride, padding=1, bias=False)]
        for block in range(3):
            if block:
                modules += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
                modules.append(nn.AvgPool2d(2))
                channels //= 2
            for _ in range(layers):
                modules.append(DenseLayer(channels, growth))
                channels += growth
        modules += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*modules, nn.Linear(channels, source.classes))


def densenet_fashion() -> Workload:
    """Three blocks of three layers with growth 12 on Fashion-MNIST; about 2 minutes."""
    recipe = Recipe(epochs=10, lr=0.1)
    return Workload("densenet-fashion", "densenet", lambda source: DenseNet(source, 3, 12, 2), "fashion", recipe)


def densenet_digits() -> Workload:
    """Three blocks of two layers with growth 8 on digits; about 5 seconds."""
    recipe = Recipe(epochs=10, batch_size=32, lr=0.05)
    return Workload("densenet-digits", "densenet", lambda source: DenseNet(source, 2, 8, 1), "digits", recipe)

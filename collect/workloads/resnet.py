"""Small residual networks, as for CIFAR in the ResNet paper (He et al., 2016): 6n + 2 layers in three stages."""

import torch
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> the block's output, halved in height and width by stride 2."""
        out_BCHW = torch.relu(self.norm1(self.conv1(x_BCHW)))
        out_BCHW = self.norm2(self.conv2(out_BCHW))
        return torch.relu(out_BCHW + self.shortcut(x_BCHW))


class ResNet(nn.Sequential):
    """A stem, three stages of `blocks` blocks, and the head: 6 * blocks + 2 layers on the longest path."""

    def __init__(self, source: Source, blocks: int, width: int) -> None:
        stem = nn.Conv2d(image_shape(source)[0], width, 3, padding=1, bias=False)
        modules: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for index in range(blocks):
                modules.append(Block(inputs, outputs, stride=2 if stage and not index else 1))
                inputs = outputs
        super().__init__(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, source.classes))


def resnet8_fashion() -> Workload:
    """ResNet-8 of 16 to 64 channels on Fashion-MNIST; about 2.5 minutes."""
    recipe = Recipe(epochs=10, lr=0.1)
    return Workload("resnet8-fashion", "resnet", lambda source: ResNet(source, 1, 16), "fashion", recipe)


def resnet14_fashion() -> Workload:
    """ResNet-14 of 12 to 48 channels on Fashion-MNIST; about 3.5 minutes."""
    recipe = Recipe(epochs=8, lr=0.1)
    return Workload("resnet14-fashion", "resnet", lambda source: ResNet(source, 2, 12), "fashion", recipe)


def resnet20_fashion() -> Workload:
    """ResNet-20 of 8 to 32 channels on Fashion-MNIST; about 3 minutes."""
    recipe = Recipe(epochs=10, lr=0.1)
    return Workload("resnet20-fashion", "resnet", lambda source: ResNet(source, 3, 8), "fashion", recipe)


def resnet8_digits() -> Workload:
    """ResNet-8 of 16 to 64 channels on digits; about 5 seconds."""
    recipe = Recipe(epochs=10, batch_size=32, lr=0.05)
    return Workload("resnet8-digits", "resnet", lambda source: ResNet(source, 1, 16), "digits", recipe)

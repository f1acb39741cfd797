"""Small ConvNeXts (Liu et al., 2022): large depthwise filters, LayerNorm, and linear layers on each pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from collect.workloads.initial import draw_weights
from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> the same shape."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """A 5x5 filter on each channel, then two 1x1 convolutions; residual, scaled down at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_C11 = nn.Parameter(torch.full((width, 1, 1), 0.1))
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            ChannelNorm(width),
            nn.Conv2d(width, 3 * width, 1),
            nn.GELU(),
            nn.Conv2d(3 * width, width, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> the same shape."""
        out_BCHW: Tensor = x_BCHW + self.scale_C11 * self.body(x_BCHW)
        return out_BCHW


class ConvNext(nn.Sequential):
    """A patch stem, stages of blocks with a 2x2 convolution between them, and the head.

    Args:
        source: Its images' shape, and the number of classes.
        widths: Channels of each stage.
        blocks: Blocks in each stage.
        patch: Pixels along the side of the stem's patches.
        spread: The standard deviation of the initial weights (`draw_weights`); None leaves PyTorch's.
    """

    def __init__(
        self, source: Source, widths: Sequence[int], blocks: int = 2, patch: int = 2, spread: float | None = None
    ) -> None:
        channels = widths[0]
        stem = nn.Conv2d(image_shape(source)[0], channels, patch, stride=patch)
        modules: list[nn.Module] = [stem, ChannelNorm(channels)]
        for stage, width in enumerate(widths):
            if stage:
                modules += [ChannelNorm(channels), nn.Conv2d(channels, width, 2, stride=2)]
            modules += [ConvNextBlock(width) for _ in range(blocks)]
            channels = width
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels)]
        super().__init__(*modules, *pooled, nn.Linear(channels, source.classes))
        draw_weights(self, spread)


def convnext_fashion() -> Workload:
    """Four blocks of 32 and 64 channels on Fashion-MNIST; about 2.5 minutes."""
    recipe = Recipe(epochs=10, optimizer="adamw", lr=3e-3, weight_decay=0.05)
    return Workload("convnext-fashion", "convnext", lambda source: ConvNext(source, (32, 64)), "fashion", recipe)


def convnext_digits() -> Workload:
    """Four blocks of 24 and 48 channels on digits; about 10 seconds."""
    recipe = Recipe(epochs=10, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05)
    return Workload("convnext-digits", "convnext", lambda source: ConvNext(source, (24, 48)), "digits", recipe)

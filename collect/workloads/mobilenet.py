"""Small networks in the manner of MobileNetV2 (Sandler et al., 2018): inverted residuals around depthwise filters."""

from collections.abc import Sequence

from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class InvertedResidual(nn.Module):
    """1x1 up to `expansion` times the channels, 3x3 on each channel by itself, 1x1 down; a residual where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW -> the block's output, halved in height and width by stride 2."""
        out_BCHW: Tensor = self.body(x_BCHW)
        return x_BCHW + out_BCHW if self.residual else out_BCHW


class MobileNet(nn.Sequential):
    """A stem, two inverted residuals a stage, and the head. Each stage but the first halves the image."""

    def __init__(self, source: Source, widths: Sequence[int], stem_stride: int) -> None:
        channels = widths[0]
        stem = nn.Conv2d(image_shape(source)[0], channels, 3, stem_stride, padding=1, bias=False)
        modules: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU6()]
        for stage, width in enumerate(widths):
            modules += [InvertedResidual(channels, width, 2 if stage else 1), InvertedResidual(width, width, 1)]
            channels = width
        super().__init__(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, source.classes))


def mobilenet_fashion() -> Workload:
    """Six inverted residuals of 16 to 48 channels on Fashion-MNIST; about 2.5 minutes."""
    recipe = Recipe(epochs=10, lr=0.1)
    return Workload(
        "mobilenet-fashion", "mobilenet", lambda source: MobileNet(source, (16, 24, 48), 2), "fashion", recipe
    )


def mobilenet_digits() -> Workload:
    """Four inverted residuals of 16 and 32 channels on digits; about 8 seconds."""
    recipe = Recipe(epochs=10, batch_size=32, lr=0.05)
    return Workload("mobilenet-digits", "mobilenet", lambda source: MobileNet(source, (16, 32), 1), "digits", recipe)

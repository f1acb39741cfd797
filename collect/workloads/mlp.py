"""Multilayer perceptrons."""

import math
from collections.abc import Sequence

from torch import nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them, on flattened images."""

    def __init__(self, source: Source, widths: Sequence[int]) -> None:
        modules: list[nn.Module] = [nn.Flatten()]
        inputs = math.prod(image_shape(source))
        for width in widths:
            modules += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        super().__init__(*modules, nn.Linear(inputs, source.classes))


def mlp_fashion() -> Workload:
    """Five layers of up to 512 units on Fashion-MNIST; about half a minute."""
    recipe = Recipe(epochs=20, lr=0.05)
    return Workload("mlp-fashion", "mlp", lambda source: Mlp(source, (512, 512, 256, 256)), "fashion", recipe)


def mlp_digits() -> Workload:
    """Five layers of up to 128 units on digits; about a second."""
    recipe = Recipe(epochs=20, batch_size=32, lr=0.05)
    return Workload("mlp-digits", "mlp", lambda source: Mlp(source, (128, 128, 64, 64)), "digits", recipe)

"""Initial weights that all have the same standard deviation, as most networks of patches that people download had."""

from torch import nn


def draw_weights(model: nn.Module, spread: float | None) -> None:
    """Draw the weights of all convolutions and linear layers anew from a normal distribution.

    Args:
        model: Its biases and other parameters stay.
        spread: The standard deviation. None leaves the weights as they are.
    """
    for module in model.modules():
        if spread is not None and isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=spread)

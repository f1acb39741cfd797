"""A recipe's optimizer and learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from collect.workloads.recipe import Recipe

_DROPS = (0.5, 0.75)
"""Shares of the steps after the warm-up at which the schedule "steps" drops, as in He et al., 2016."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Make the recipe's optimizer with one group over all parameters, in the model's order.

    Freezing and resuming rely on the order: a frozen layer keeps its index, by which its state is found again.
    """
    parameters = list(model.parameters())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    betas = (recipe.momentum, 0.999)
    return torch.optim.AdamW(parameters, recipe.lr, betas, weight_decay=recipe.weight_decay)


def make_scheduler(
    optimizer: Optimizer, recipe: Recipe, total_steps: int, end: int | None = None, cooldown: float = 0.0
) -> LambdaLR:
    """Make the recipe's schedule over `total_steps` optimizer steps.

    Args:
        optimizer: The optimizer whose rate is scheduled.
        recipe: The recipe.
        total_steps: Steps of the schedule.
        end: Steps that are taken, where they are fewer.
        cooldown: The last share of these over which the rate falls on a straight line to zero.
    """
    last = total_steps if end is None else end
    begin = last - round(cooldown * last)

    def share(step: int) -> float:
        if begin == last or step <= begin:
            return lr_share(step, total_steps, recipe)
        # As elsewhere, the step after the last one would have a rate of zero.
        return lr_share(begin, total_steps, recipe) * (last - step) / (last - begin)

    return LambdaLR(optimizer, share)


def lr_share(step: int, total_steps: int, recipe: Recipe) -> float:
    """Return the share of `recipe.lr` for a step, counted from 0.

    The last step of the warm-up is the first at the full rate. The step after the last one would have a rate of zero.
    """
    warm_steps = round(recipe.warmup * total_steps)
    if step < warm_steps:
        return (step + 1) / warm_steps
    done = (step - warm_steps) / max(total_steps - warm_steps, 1)
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "steps":
        return 0.1 ** sum(done >= drop for drop in _DROPS)
    return 1 - done if recipe.schedule == "linear" else 1.0

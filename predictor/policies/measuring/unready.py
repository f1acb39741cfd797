"""Which layers are of no use with random weights: they have to learn before they freeze."""

from typing import Any

import torch
from torch import Tensor, nn

from predictor.layers.layer import Layer
from predictor.policies.measuring.gradients import real_of

CLOSED = 0.01
"""Weights that are all smaller let next to nothing through: some begin at zero, others at 1e-6."""
_WITH_BIAS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_MIXING = (*_WITH_BIAS, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules that multiply their input by a matrix. A random one keeps how far samples are from each other."""


def is_ready(model: nn.Module, layer: Layer) -> bool:
    """Whether a layer of a model is of use with random weights."""
    return float(Openness(model).of(layer)) >= CLOSED


class Openness:
    """How far samples get through layers with random weights as they are: below CLOSED a layer must learn first.

    - A **table** is 0. It has rows that are looked up or added, as an embedding of words or of positions. A random one
      says nothing of which words are alike, and positions that begin small can hardly be told apart. To it counts every
      weight of two or more dimensions that no linear layer, convolution, recurrent layer or attention holds.
    - So is every layer of a model **without norms**: what goes through random layers shrinks or grows there, and what
      comes behind has to make up for it.
    - So is a layer whose **biases outweigh its weights**: it adds more, the same to all samples, than it passes on of
      inputs of size 1.
    - Others have the size of the smallest of their weights, each by its largest number. A norm or a layer scale that
      begins near zero closes a branch, and so does a matrix of zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name.rpartition(".")[2] for name, parameter in model.named_parameters()}
        self._mixing = {id(p) for m in model.modules() if isinstance(m, _MIXING) for p in m.parameters(recurse=False)}
        kinds = {type(module).__name__.lower() for module in model.modules()}
        self._normalised = any("norm" in kind and "normali" not in kind for kind in kinds)  # of inputs, as Normalize

    @torch.no_grad()
    def of(self, layer: Layer) -> Tensor:
        """A scalar on the device of the layer's weights."""
        weights = [p for p in layer.parameters() if p.numel() and "bias" not in self._names.get(id(p), "")]
        device = layer.own[0].device
        table = any(id(p) not in self._mixing and sum(size > 1 for size in p.shape) >= 2 for p in weights)
        if table or not self._normalised:
            return torch.zeros((), device=device)
        largest = [real_of(p).abs().amax().to(device) for p in weights]
        passes = [_passes_more_than_it_adds(module).to(device) for module in _biased(layer)]
        return torch.stack([torch.ones((), device=device), *largest, *passes]).amin()


def _biased(layer: Layer) -> list[nn.Module]:
    inside = {inner for module in layer.modules for inner in module.modules()}
    return [each for each in inside if isinstance(each, _WITH_BIAS) and isinstance(each.bias, Tensor)]


def _passes_more_than_it_adds(module: Any) -> Tensor:
    """1 where it does, else 0."""
    passes: Tensor = real_of(module.weight).square().sum() > real_of(module.bias).square().sum()
    return passes.float()

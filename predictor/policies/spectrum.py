"""Spectrum: the layers whose weights hold most signal train, the others are frozen from the start."""

import re
from collections.abc import Mapping, Sequence
from math import isnan, sqrt

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View

_NORMAL_IQR = 1.349
"""The distance between the quartiles of a normal distribution, in standard deviations."""


class SpectrumPolicy(FreezePolicy):
    """Trains the share of the layers whose pretrained weights have most signal over noise; freezes the rest at once.

    Paper: Spectrum (Hartford et al., 2024, arXiv 2406.06623), made for fine-tuning language models.

    Rule: of an n x m matrix with singular values S, the noise is sigma = IQR(S) / 1.349, and noise reaches up to
    sigma (1 + sqrt(beta)) with beta = min(n, m) / max(n, m), after Marchenko and Pastur. SNR = (sum of S above / sum of
    S up to there) / max S. Of the matrices of each type, the share with the highest SNR trains. The embeddings and the
    head always do. The choice is made before the first step and stays.

    Signal: the first weights.

    Differs: a layer trains if the matrices that would train hold at least half of its weights; the paper freezes single
    matrices. The type of a matrix is its name without numbers (`blocks.mlp.fc1.weight`), where the authors' code has a
    list of module names. A convolution is taken as a matrix of output channels by all else; the paper has none. As in
    that code, the share is rounded down to whole matrices, so that the only one of its type is frozen. From scratch it
    says nothing, since all weights are noise then.

    Cost: the singular values of every matrix, once, on the CPU.

    Args:
        share: the share of each type's matrices that train. The paper has 0.5 and 0.25.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"share={share}: give a share of the matrices, from 0 to 1")
        self.share = share

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Note which parameters are matrices, and of which type."""
        embedding = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._embeddings = embedding
        self._types = {id(p): re.sub(r"\d+", "", name) for name, p in model.named_parameters() if p.dim() >= 2}

    def due(self, step: int, total_steps: int) -> bool:
        """Only before the first step."""
        return step == 0

    def decide(self, view: View) -> frozenset[int]:
        """All layers but those with signal."""
        chosen = self._chosen(view.layers)
        return frozenset(index for index, layer in enumerate(view.layers) if not self._trains(layer, chosen))

    @torch.no_grad()
    def _chosen(self, layers: Sequence[Layer]) -> frozenset[int]:
        """The ids of the matrices that train."""
        by_type: dict[str, dict[int, float]] = {}
        for parameter in (p for layer in layers for p in layer.parameters() if self._ranked(p)):
            by_type.setdefault(self._types[id(parameter)], {})[id(parameter)] = signal_to_noise(parameter)
        return frozenset(chosen for ratios in by_type.values() for chosen in self._best(ratios))

    def _best(self, ratios: Mapping[int, float]) -> list[int]:
        count = int(len(ratios) * self.share + 1e-9)
        return sorted(ratios, key=lambda each: -ratios[each])[:count]

    def _ranked(self, parameter: Tensor) -> bool:
        return id(parameter) in self._types and parameter.numel() > 0 and id(parameter) not in self._embeddings

    def _trains(self, layer: Layer, chosen: frozenset[int]) -> bool:
        if any(id(parameter) in self._embeddings for parameter in layer.parameters()):
            return True
        sizes = {id(parameter): parameter.numel() for parameter in layer.parameters() if self._ranked(parameter)}
        return bool(sizes) and 2 * sum(sizes[each] for each in chosen & set(sizes)) >= sum(sizes.values())


def signal_to_noise(weight: Tensor) -> float:
    """The SNR of a weight, with all dimensions behind the first as one; infinite where there is no noise.

    0 for a weight of zeros.
    """
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    matrix = whole.detach().cpu().flatten(1)
    values = torch.linalg.svdvals(matrix if matrix.is_complex() else matrix.float())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], device="cpu", dtype=values.dtype))
    small, large = sorted(matrix.shape)
    edge = float(quartiles[1] - quartiles[0]) / _NORMAL_IQR * (1 + sqrt(small / large))
    above = values > edge
    ratio = float(values[above].sum() / values[~above].sum() / values.max())
    return 0.0 if isnan(ratio) else ratio

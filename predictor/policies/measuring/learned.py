"""Whether a layer's weights have learned anything yet: how far they are from independent random numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from predictor.layers.layer import Layer
from predictor.model.first_look import LEARNED
from predictor.policies.measuring.gradients import real_of

_LARGEST = 1024
"""Rows and columns of a matrix that are looked at, spread over it. So many tell as well as all."""


def has_learned(layers: Sequence[Layer]) -> bool:
    """Whether the first layer that trains has learned something, such as a pretrained one: not from scratch.

    Of weights that are sharded, or have no memory yet, it says so too: the look at their gradients will refuse them.
    """
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return _unfit(layer) or float(evidence_of(layer)) >= LEARNED
    return False


def from_scratch(layers: Sequence[Layer]) -> bool:
    """Whether nearly no layer has learned anything: see `FirstLook.from_scratch`."""
    learned = 0
    for layer in layers:
        learned += _unfit(layer) or float(evidence_of(layer)) >= LEARNED
        if 10 * learned > len(layers):
            return False
    return True


def _unfit(layer: Layer) -> bool:
    return any(hasattr(parameter, "device_mesh") or parameter.is_meta for parameter in layer.parameters())


@torch.no_grad()
def evidence_of(layer: Layer) -> Tensor:
    """How far a layer's weights are from independent random numbers, as a scalar on the device of its weights.

    The largest statistic of its matrices, at least 0. Whatever distribution initial weights are drawn from, they have
    a statistic of mean 0 and standard deviation 1; orthogonal ones have less. Training makes some directions larger
    than others. That gives more: 4 for the 16 x 9 weights of a small network's first layer, 10 to 1000 for most others.
    """
    found = [_sphericity(matrix) for matrix in map(_as_matrix, layer.parameters()) if matrix is not None]
    none = torch.zeros((), device=layer.own[0].device)
    return torch.stack([none, *(value.to(none.device) for value in found)]).amax()


def _as_matrix(weights: Tensor) -> Tensor | None:
    """matrix_RC: output by input, R at least C; None if it has no two rows or columns, or holds no real numbers."""
    if weights.dim() < 2 or weights.numel() == 0 or not (weights.is_floating_point() or weights.is_complex()):
        return None
    matrix = weights.flatten(1)
    matrix = matrix[:: -(-matrix.shape[0] // _LARGEST), :: -(-matrix.shape[1] // _LARGEST)]
    if min(matrix.shape) < 2:
        return None
    return real_of(matrix).flatten(1) if matrix.shape[0] >= matrix.shape[1] else real_of(matrix.T).flatten(1)


def _sphericity(matrix_RC: Tensor) -> Tensor:
    """John's test that the columns are uncorrelated and of one size, corrected for tails: (R U - C - 1 - kurtosis) / 2.

    U is the mean over columns of the squared eigenvalues of S / (trace S / C) - I, with S the columns' second moments.
    John, "Some optimal multivariate tests", Biometrika 1971. For many columns, and for weights that are not normal:
    Wang and Yao, "On the sphericity test with large-dimensional observations", Electronic Journal of Statistics 2013.
    """
    rows, columns = matrix_RC.shape
    matrix_RC = matrix_RC / matrix_RC.square().mean().sqrt()
    moments_CC = matrix_RC.T @ matrix_RC / rows
    spread = moments_CC.square().sum() / columns - 1
    kurtosis = matrix_RC.pow(4).mean() - 3
    return torch.nan_to_num((rows * spread - columns - 1 - kurtosis) / 2, nan=0.0, posinf=0.0, neginf=0.0)

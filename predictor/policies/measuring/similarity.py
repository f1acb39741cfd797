"""How similar two representations of the same inputs are: CKA and the similarity-preserving loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def by_sample(output: Any, samples: int) -> Tensor | None:
    """features_BF of a module's output, one row for each of the `samples` inputs; None where it has no such rows.

    The batch may be the first dimension, alone or with others folded into it, or the second (as in
    `nn.MultiheadAttention` without `batch_first`).
    """
    while not isinstance(output, Tensor):
        parts = list(output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ())
        if not parts:
            return None
        output = parts[0]
    if output.dim() > 1 and output.shape[0] != samples and output.shape[1] == samples:
        output = output.transpose(0, 1)
    if output.numel() == 0 or output.dim() == 0 or output.shape[0] % samples:
        return None
    features_BF: Tensor = output.reshape(samples, -1)
    return features_BF


def gram(features_BF: Tensor) -> Tensor:
    """gram_BB = XX' with the columns of X centred; all zero where the samples differ by rounding errors alone."""
    centred_BF = features_BF - features_BF.mean(dim=0)
    noise = 1e-6 * torch.linalg.vector_norm(features_BF)
    return torch.where(torch.linalg.vector_norm(centred_BF) <= noise, 0.0, centred_BF @ centred_BF.T)


def upper_triangle(gram_BB: Tensor) -> Tensor:
    """The numbers above the diagonal, row by row: triangle_P, P = n (n - 1) / 2."""
    rows, columns = torch.triu_indices(len(gram_BB), len(gram_BB), offset=1, device=gram_BB.device)
    return gram_BB[rows, columns]


def cka_to_last(triangles_TP: Tensor, samples: int) -> Tensor:
    """cka_T in float64: unbiased CKA of each Gram matrix to the last one; NaN where one of the two is constant."""
    rows, columns = torch.triu_indices(samples, samples, offset=1, device=triangles_TP.device)
    grams_TBB = torch.zeros(len(triangles_TP), samples, samples, dtype=torch.float64, device=triangles_TP.device)
    grams_TBB[:, rows, columns] = triangles_TP.double()
    grams_TBB += grams_TBB.mT.clone()
    last_BB = grams_TBB[-1]
    own_T, last = hsic1(grams_TBB, grams_TBB), hsic1(last_BB, last_BB)
    return hsic1(grams_TBB, last_BB) / (own_T * last).sqrt()


def hsic1(gram_BB: Tensor, other_BB: Tensor) -> Tensor:
    """The unbiased Hilbert-Schmidt independence criterion of Gram matrices with zeros as diagonals; may be batched."""
    samples = gram_BB.shape[-1]
    trace = (gram_BB * other_BB).sum(dim=(-2, -1))  # tr(KL), since L is symmetric
    sums_B, other_sums_B = gram_BB.sum(dim=-1), other_BB.sum(dim=-1)
    product = sums_B.sum(dim=-1) * other_sums_B.sum(dim=-1) / ((samples - 1) * (samples - 2))
    cross = 2 / (samples - 2) * (sums_B * other_sums_B).sum(dim=-1)  # 1'KL1 = (K1)'(L1)
    return (trace + product - cross) / (samples * (samples - 3))


def preserving_loss(features_BF: Tensor, reference_BF: Tensor) -> Tensor:
    """The similarity-preserving loss (Tung and Mori, ICCV 2019) between two outputs to the same B inputs, a scalar.

    With G = AA' of each, and each row of G divided by its L2 norm: ||G - G_reference||_F^2 / B^2, from 0 to 4 / B.
    It is 0 where the inputs are equally similar to one another in both. The scale of the outputs has no effect.
    """
    difference_BB = _normalized_gram(features_BF) - _normalized_gram(reference_BF)
    return difference_BB.square().sum() / len(features_BF) ** 2


def _normalized_gram(features_BF: Tensor) -> Tensor:
    return F.normalize(features_BF @ features_BF.T, dim=1)

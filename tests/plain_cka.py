"""Unbiased CKA written out plainly, for the real one to be compared with."""

import torch
from torch import Tensor


def off_diagonal(gram_BB: Tensor) -> Tensor:
    """The matrix with its diagonal zeroed."""
    return gram_BB - torch.diag(torch.diag(gram_BB))


def plain_cka(x_BF: Tensor, y_BF: Tensor) -> float:
    """The formula of Song et al. (JMLR 2012) on whole matrices, in float64 and without centring."""
    n, one = len(x_BF), torch.ones(len(x_BF), dtype=torch.float64)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        product = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (torch.trace(k @ m) + product - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    k, m = off_diagonal(x_BF.double() @ x_BF.double().T), off_diagonal(y_BF.double() @ y_BF.double().T)
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())

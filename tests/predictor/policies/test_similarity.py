"""The formulas of similarity against their definitions and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from predictor.policies.measuring.similarity import by_sample, cka_to_last, gram, hsic1, preserving_loss, upper_triangle
from tests.plain_cka import off_diagonal, plain_cka


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_hsic(gram_BB: Tensor, other_BB: Tensor) -> float:
    """The U-statistic by its definition: the mean over all ordered choices of four different samples."""
    terms = [
        gram_BB[i, j] * (other_BB[i, j] + other_BB[q, r] - 2 * other_BB[i, q])
        for i, j, q, r in itertools.permutations(range(len(gram_BB)), 4)
    ]
    return float(sum(terms) / len(terms))


def cka(x_BF: Tensor, y_BF: Tensor) -> float:
    triangles_TP = torch.stack([upper_triangle(gram(features)) for features in (x_BF, y_BF)])
    return cka_to_last(triangles_TP, len(x_BF))[0].item()


def test_hsic1_is_the_unbiased_estimate() -> None:
    k, m = random(6, 3) @ random(6, 3).T, random(6, 2, seed=1) @ random(6, 2, seed=1).T
    assert hsic1(off_diagonal(k), off_diagonal(m)).item() == pytest.approx(plain_hsic(k, m), rel=1e-10)


def test_hsic1_by_hand() -> None:
    """n = 4, K = L = 1 for the pairs 12 and 34: tr 4, product 4 * 4 / 6, cross 2/2 * 4; (4 + 8/3 - 4) / 4."""
    k = torch.zeros(4, 4, dtype=torch.float64)
    k[0, 1] = k[1, 0] = k[2, 3] = k[3, 2] = 1.0
    assert hsic1(k, k).item() == pytest.approx(2 / 3, rel=1e-12)


def test_the_broadcast_bug_would_be_seen() -> None:
    """`K - torch.diag(K)` subtracts a row vector from every row: another number."""
    x_BF, y_BF = random(8, 5), random(8, 5, seed=1)
    k, m = x_BF @ x_BF.T, y_BF @ y_BF.T
    bug = hsic1(k - torch.diag(k), m - torch.diag(m))
    assert abs(hsic1(off_diagonal(k), off_diagonal(m)) - bug) > 0.1 * abs(bug)


def test_cka_against_the_plain_formula() -> None:
    x_BF, y_BF = random(10, 7), random(10, 7) + 0.5 * random(10, 7, seed=1)
    assert cka(x_BF, y_BF) == pytest.approx(plain_cka(x_BF, y_BF), rel=1e-9)
    assert 0.3 < cka(x_BF, y_BF) < 0.99


def test_what_cka_does_not_see() -> None:
    x_BF = random(10, 6)
    turned_BF = x_BF @ torch.linalg.qr(random(6, 6, seed=1)).Q
    assert cka(x_BF, x_BF) == pytest.approx(1.0, abs=1e-12)
    assert cka(x_BF, 3.0 * turned_BF + 5.0) == pytest.approx(1.0, abs=1e-10)


def test_cka_is_unbiased() -> None:
    """Independent features, many more than samples: 0 on average, where the plain estimate gives nearly 1."""
    values = [cka(random(12, 500, seed=seed), random(12, 500, seed=1000 + seed)) for seed in range(30)]
    assert abs(np.mean(values)) < 0.1
    x_BF, y_BF = random(12, 500), random(12, 500, seed=1000)
    x_BF, y_BF = x_BF - x_BF.mean(0), y_BF - y_BF.mean(0)
    assert (y_BF.T @ x_BF).norm() ** 2 / ((x_BF.T @ x_BF).norm() * (y_BF.T @ y_BF).norm()) > 0.8


def test_float32_features_far_from_zero_lose_nothing() -> None:
    x_BF, y_BF = random(16, 40), random(16, 40) + random(16, 40, seed=1)
    assert cka((x_BF + 300).float(), (y_BF - 300).float()) == pytest.approx(plain_cka(x_BF, y_BF), abs=1e-4)


@pytest.mark.parametrize("constant", [torch.zeros(8, 5), torch.full((8, 5), 0.1) + torch.arange(5) * 1.1])
def test_an_output_that_is_the_same_for_all_samples_has_no_similarity(constant: Tensor) -> None:
    assert math.isnan(cka(constant, random(8, 5).float()))
    assert math.isnan(cka(random(8, 5).float(), constant))


def test_outputs_of_many_kinds() -> None:
    x_BTC = torch.arange(24.0).view(2, 3, 4)
    rows = x_BTC.reshape(2, 12)
    for output in (x_BTC, (x_BTC, None), [x_BTC], {"hidden": x_BTC}, ((x_BTC,), 1), x_BTC.reshape(6, 4)):
        features_BF = by_sample(output, 2)
        assert features_BF is not None
        assert torch.equal(features_BF, rows)
    turned_BF = by_sample(x_BTC.transpose(0, 1), 2)  # tokens first: 3 x 2 x 4
    assert turned_BF is not None
    assert torch.equal(turned_BF, rows)
    for nothing in (None, (), {}, torch.tensor(1.0), torch.zeros(2, 0), torch.zeros(5, 3), "text"[:0]):
        assert by_sample(nothing, 2) is None


def test_plain_case_of_cka_by_hand() -> None:
    """Four inputs, one feature each: x tells the pairs 01 | 23 apart, y the pairs 02 | 13, so neither says a thing of
    the other: centred K = xx', L = yy', and without their diagonals tr(KL) = -4, both with sums of rows of -1.

    HSIC1(K, L) = (-4 + 16/6 - 4) / 4 = -4/3, HSIC1(K, K) = (12 + 16/6 - 4) / 4 = 8/3, and CKA = -1/2.
    """
    x_BF, y_BF = torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [-1], [1], [-1]])
    assert cka(x_BF, y_BF) == pytest.approx(-0.5, abs=1e-12)


def test_preserving_loss_by_hand() -> None:
    """A = I: G = I, rows (1, 0) and (0, 1). B = [[1, 0], [1, 0]]: G = 1, rows of 1 / sqrt(2) each.

    The difference has 1 - 1/sqrt(2) twice and 1/sqrt(2) twice: (2 (1 - r)^2 + 2 r^2) / 4 = 1 - r = 0.2929.
    """
    eye_BF, same_BF = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert preserving_loss(eye_BF, same_BF).item() == pytest.approx(1 - 0.5**0.5, rel=1e-6)
    assert preserving_loss(same_BF, eye_BF).item() == pytest.approx(1 - 0.5**0.5, rel=1e-6)
    # G = [[1, 1], [1, 2]] against I: rows (1, 1) / sqrt(2) and (1, 2) / sqrt(5).
    shear_BF = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = ((1 - 0.5**0.5) ** 2 + 0.5 + 0.2 + (1 - 2 / 5**0.5) ** 2) / 4
    assert preserving_loss(eye_BF, shear_BF).item() == pytest.approx(expected, rel=1e-6)


def test_preserving_loss_does_not_see_scale_and_rotation() -> None:
    x_BF = random(6, 4)
    turned_BF = 3.0 * x_BF @ torch.linalg.qr(random(4, 4, seed=1)).Q
    assert preserving_loss(x_BF, turned_BF).item() == pytest.approx(0.0, abs=1e-12)
    assert preserving_loss(torch.eye(2), -torch.eye(2)).item() == 0.0
    assert preserving_loss(random(6, 4), random(6, 4, seed=1)).item() <= 4 / 6

"""The probe: a logistic regression on a head's features, its penalty chosen on held-out samples."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_FOLD = 5
"""One of so many samples of each class is held out."""
FEWEST = 10
"""Samples that have to be held out, to decide by."""
_PENALTIES = tuple(10 ** (-step / 2) for step in range(13))
"""Strengths of the penalty that are tried, the strongest first: 1 to 1e-6, for features of mean square length 1."""
_WORSE = 1.02
"""By this factor the held-out loss may rise above the least before no weaker penalty is tried."""
_ITERATIONS = 50
_KEPT = 0.85
"""The share of the best probe's gain that the chosen one has to reach, so that the head is as small as it can be: a
confident head leaves the layers before it little to learn from, and what they learn fits it (Ren et al. 2302.05779)."""
_CLEAR, _ERRORS = 0.1, 2.0
"""The share of the loss, and the standard errors, by which a probe has to be better."""


def held_out(y_N: Tensor) -> Tensor:
    """Which samples are held out: every fifth of each class, in the order in which they came."""
    order_N = torch.argsort(y_N, stable=True)
    sorted_N = y_N[order_N]
    rank_N = torch.empty_like(y_N)
    rank_N[order_N] = torch.arange(len(y_N)) - torch.searchsorted(sorted_N, sorted_N)
    return rank_N % _FOLD == _FOLD // 2


def losses_before(linear: Any, fitted_y: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
    """The held-out losses without a probe: of the head as it is, or of the frequencies where those are less."""
    x_HF, y_H = held[0], held[1].to(held[0].device)
    bias = None if linear.bias is None else linear.bias.detach().float()
    own_H = F.cross_entropy(F.linear(x_HF, linear.weight.detach().float(), bias), y_H, reduction="none")
    share_C = torch.bincount(fitted_y, minlength=linear.out_features) / len(fitted_y)
    prior_H = -share_C.log().to(y_H.device)[y_H]
    return own_H if own_H.mean() < prior_H.mean() else prior_H


@dataclass(frozen=True)
class Point:
    """A fit with one penalty."""

    penalty: float
    weights: tuple[Tensor, ...]
    losses_H: Tensor
    accuracy: float
    train_accuracy: float
    train_loss: float

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return self.losses_H.mean().item()


class Regression:
    """A multinomial logistic regression, fitted with one penalty after the other, each from the one before.

    Features are centred, where the head has a bias, and scaled by one number to a mean square length of 1. Scaling each
    alone would give much weight to features that hardly vary.
    """

    def __init__(self, x_NF: Tensor, y_N: Tensor, classes: int, bias: bool) -> None:
        self._mean_F = x_NF.mean(dim=0) * bias
        x_NF = x_NF - self._mean_F
        self._scale = x_NF.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
        self._x_NF, self._y_N = x_NF / self._scale, y_N.to(x_NF.device)
        self._weight_CF = x_NF.new_zeros(classes, x_NF.shape[1], requires_grad=True)
        self._bias_C = x_NF.new_zeros(classes, requires_grad=bias)
        self.flops = 0

    def fit(self, penalty: float) -> None:
        """Minimise the mean cross entropy plus half of the penalty times the squared length of the weights."""
        wanted = [parameter for parameter in (self._weight_CF, self._bias_C) if parameter.requires_grad]
        optimizer = torch.optim.LBFGS(wanted, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            self.flops += 4 * self._x_NF.numel() * len(self._bias_C)  # the logits, and the gradient of the weights
            logits_NC = F.linear(self._x_NF, self._weight_CF, self._bias_C)
            value = F.cross_entropy(logits_NC, self._y_N) + penalty / 2 * self._weight_CF.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def point(self, penalty: float, held: tuple[Tensor, Tensor]) -> Point:
        """What the fit with this penalty gives."""
        weight_CF = self._weight_CF / self._scale
        weights = (weight_CF, self._bias_C - weight_CF @ self._mean_F) if self._bias_C.requires_grad else (weight_CF,)
        x_HF, y_H = held[0], held[1].to(held[0].device)
        held_HC, own_NC = F.linear(x_HF, *weights), F.linear(self._x_NF, self._weight_CF, self._bias_C)
        return Point(
            penalty,
            tuple(each.clone() for each in weights),
            F.cross_entropy(held_HC, y_H, reduction="none"),
            (held_HC.argmax(dim=1) == y_H).float().mean().item(),
            (own_NC.argmax(dim=1) == self._y_N).float().mean().item(),
            F.cross_entropy(own_NC, self._y_N).item(),
        )


def chosen(fit: Regression, held: tuple[Tensor, Tensor], before: float) -> Point:
    """The strongest penalty with which most of the best probe's gain on held-out samples is there."""
    points: list[Point] = []
    for penalty in _PENALTIES:
        fit.fit(penalty)
        points.append(fit.point(penalty, held))
        least = min(point.loss for point in points)
        if points[-1].loss > _WORSE * least:
            break
    enough = _KEPT * (before - least)
    return next((point for point in points if before - point.loss >= enough), points[0])


def too_little(losses_H: Tensor, before_H: Tensor) -> str:
    """Why the probe's held-out losses are not clearly below those without it; empty where they are."""
    gain_H = (before_H - losses_H).double()
    gain, before = gain_H.mean().item(), before_H.mean().item()
    error = gain_H.std().item() / math.sqrt(len(gain_H)) if len(gain_H) > 1 else math.inf
    if gain >= max(_CLEAR * before, _ERRORS * error):
        return ""
    return (
        f"the probe's loss on {len(gain_H)} held-out samples, {before - gain:.3f}, is not clearly below {before:.3f}, "
        "that of the head as it was or of the frequencies of the classes"
    )

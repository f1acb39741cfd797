"""Probabilities that hold for other families of networks: Platt's line through the logits of families left out.

Platt 1999, "Probabilistic outputs for support vector machines".
"""

from dataclasses import dataclass

import numpy as np

from predictor.training.metrics import Bools, Floats

_SMALLEST = 1e-7
"""Probabilities nearer to 0 or 1 have this distance: float32 knows none that is much smaller."""


@dataclass(frozen=True)
class Calibration:
    """logit -> slope x logit + shift. It keeps the order of the probabilities."""

    slope: float = 1.0
    """Above 0; below 1 for a model that is too sure of itself."""
    shift: float = 0.0

    def __call__(self, probability_N: Floats) -> Floats:
        """The calibrated probabilities."""
        return np.asarray(1 / (1 + np.exp(-(self.slope * _logit(probability_N) + self.shift))))


def fit_calibration(labels_N: Bools, probability_N: Floats) -> Calibration:
    """The line under which these labels are most likely.

    Where none that rises is, as for labels of one class or for judgements that are no better than chance, the
    probabilities stay as they are.
    """
    from sklearn.linear_model import LogisticRegression

    if labels_N.all() or not labels_N.any():
        return Calibration()
    line = LogisticRegression(C=np.inf).fit(_logit(probability_N)[:, None], labels_N)
    slope, shift = float(line.coef_[0, 0]), float(line.intercept_[0])
    return Calibration(slope, shift) if slope > 0 else Calibration()


def _logit(probability_N: Floats) -> Floats:
    clipped_N = np.clip(probability_N, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(clipped_N / (1 - clipped_N)))

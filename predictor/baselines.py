"""What a learned predictor has to beat: the majority class, a clock, and logistic regression on hand-made features."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from predictor.attention import MOTION
from predictor.metrics import Floats
from predictor.tokens import motion_of
from predictor.windows import SIGNALS, WindowSet

_COLUMN = {name: place for place, name in enumerate((*MOTION, *SIGNALS))}


class Judge(Protocol):
    """Whatever gives each window a probability of being freezable."""

    def probability_N(self, windows: WindowSet) -> Floats:
        """Probabilities in the order of the set's index."""
        ...


class Majority:
    """The share of freezable windows among those that it was fitted on, whatever the window."""

    def __init__(self, windows: WindowSet) -> None:
        self._share = float(windows.labels_N.double().mean())

    def probability_N(self, windows: WindowSet) -> Floats:
        """That share, for every window."""
        return np.full(len(windows), self._share)


class Clock:
    """Logistic regression on progress and depth alone: it knows when it is, and nothing about the weights."""

    def __init__(self, windows: WindowSet) -> None:
        self._model = _logistic(_clock_features(windows), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, _clock_features(windows))


class HandMade:
    """Logistic regression on seven features of the motion, and the newest snapshot's signals.

    Log of the newest and of the oldest relative step; log displacement; displacement over path; mean and newest cosine
    between successive steps; newest change of the log step; progress, depth and log learning rate.
    """

    def __init__(self, windows: WindowSet, weights: int) -> None:
        self._weights = weights
        self._model = _logistic(_hand_made_features(windows, weights), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, _hand_made_features(windows, self._weights))


def _clock_features(windows: WindowSet) -> NDArray[np.floating[Any]]:
    return np.stack([windows.progress_N.numpy(), windows.depth_N.numpy()], axis=1)


def _hand_made_features(windows: WindowSet, weights: int) -> NDArray[np.floating[Any]]:
    tokens_NTF = motion_of(windows, weights).numpy()
    newest_NF = tokens_NTF[:, -1]
    oldest_step_N = tokens_NTF[:, 0, _COLUMN["log_step"]]
    mean_cosine_N = tokens_NTF[:, 1:, _COLUMN["cosine"]].mean(axis=1)  # the first step has none before it
    kept = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", *SIGNALS)
    return np.column_stack([oldest_step_N, mean_cosine_N, newest_NF[:, [_COLUMN[name] for name in kept]]])


def _logistic(features_NF: NDArray[np.floating[Any]], windows: WindowSet) -> Any:
    """A fitted pipeline. scikit-learn raises ValueError where the labels are all the same: see fit.check_labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(features_NF, windows.labels_N.numpy())


def _probability(model: Any, features_NF: NDArray[np.floating[Any]]) -> Floats:
    probability_N: Floats = model.predict_proba(features_NF)[:, 1].astype(np.float64)
    return probability_N

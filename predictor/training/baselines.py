"""What a learned predictor has to beat: the majority class, what is known without the weights, hand-made features."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from predictor.model.features import SIGNALS
from predictor.model.network import MOTION, PredictorConfig
from predictor.training.metrics import Floats
from predictor.training.tokens import kept_tokens
from predictor.training.windows import WindowSet

_COLUMN = {name: place for place, name in enumerate((*MOTION, *SIGNALS))}
Features = NDArray[np.floating[Any]]


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


class FromSignals:
    """Logistic regression on some of the newest snapshot's signals, named as in SIGNALS, and on nothing of the weights.

    With progress and depth it is a clock.
    """

    def __init__(self, windows: WindowSet, *names: str) -> None:
        self._names = names
        self._model = _logistic(signals_NF(windows, *names), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, signals_NF(windows, *self._names))


class HandMade:
    """Logistic regression on seven features of the motion, and the newest snapshot's signals.

    Log of the newest and of the oldest relative step; log displacement; displacement over path; mean and newest cosine
    between successive steps; newest change of the log step; and all of SIGNALS.
    """

    def __init__(self, windows: WindowSet, weights: int) -> None:
        self._weights = weights
        self._model = _logistic(_hand_made_features(windows, weights), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, _hand_made_features(windows, self._weights))


class Trees:
    """Gradient-boosted trees on the features of HandMade: scikit-learn's, by default settings, without early stopping.

    On one thread: several would add the same numbers in another order, and so give other trees.
    """

    def __init__(self, windows: WindowSet, weights: int) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        self._weights = weights
        model = HistGradientBoostingClassifier(early_stopping=False, random_state=0)
        with _one_thread():
            self._model = model.fit(_hand_made_features(windows, weights), windows.labels_N.numpy())

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        with _one_thread():
            return _probability(self._model, _hand_made_features(windows, self._weights))


def signals_NF(windows: WindowSet, *names: str) -> Features:
    """The newest snapshot's signals of these names, one column each, in the order of the set's index."""
    columns = [SIGNALS.index(name) for name in names]
    # The index goes through a run's windows by snapshot, then by layer, and passes over runs that have none.
    parts = [
        run.signals_TLS[windows.window - 1 :, :, columns].flatten(0, 1).numpy()
        for run in windows.runs
        if len(run.labels_TL) >= windows.window
    ]
    return np.concatenate(parts)


def _hand_made_features(windows: WindowSet, weights: int) -> Features:
    tokens_NTF = kept_tokens(windows, PredictorConfig(weights=weights)).numpy()
    newest_NF = tokens_NTF[:, -1]
    oldest_step_N = tokens_NTF[:, 0, _COLUMN["log_step"]]
    mean_cosine_N = tokens_NTF[:, 1:, _COLUMN["cosine"]].mean(axis=1)  # the first step has none before it
    kept = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", *SIGNALS)
    return np.column_stack([oldest_step_N, mean_cosine_N, newest_NF[:, [_COLUMN[name] for name in kept]]])


def _logistic(features_NF: Features, windows: WindowSet) -> Any:
    """A fitted pipeline. scikit-learn raises ValueError where the labels are all the same: see fit.check_windows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(features_NF, windows.labels_N.numpy())


def _one_thread() -> Any:
    """A context in which OpenMP, which the trees are grown with, has one thread."""
    # scikit-learn brings it along.
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1, user_api="openmp")


def _probability(model: Any, features_NF: Features) -> Floats:
    probability_N: Floats = model.predict_proba(features_NF)[:, 1].astype(np.float64)
    return probability_N

"""The classifiers that a predictor is compared with: majority class, clock alone, features made by hand."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from predictor.model.config import FEATURES, MOTION, PredictorConfig
from predictor.training.dataset import WindowSet, kept_tokens
from predictor.training.metrics import Floats

_COLUMN = {name: index for index, name in enumerate((*MOTION, *FEATURES))}
Features = NDArray[np.floating[Any]]


class Classifier(Protocol):
    """Whatever predicts for each window the probability that it is freezable."""

    def probability_N(self, windows: WindowSet) -> Floats:
        """Probabilities in the order of the set's index."""
        ...


class Majority:
    """The share of freezable windows in the training set, for every window."""

    def __init__(self, windows: WindowSet) -> None:
        self._share = float(windows.labels_N.double().mean())

    def probability_N(self, windows: WindowSet) -> Floats:
        """That share, for every window."""
        return np.full(len(windows), self._share)


class FromFeatures:
    """Logistic regression on some of the newest snapshot's FEATURES. With progress and depth it is a clock."""

    def __init__(self, windows: WindowSet, *names: str) -> None:
        self._names = names
        self._model = _logistic(windows.features_NF(*names).numpy(), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, windows.features_NF(*self._names).numpy())


class HandMade:
    """Logistic regression on seven features of the motion, and all FEATURES of the newest snapshot.

    The seven: log of the newest and of the oldest relative step, log displacement, displacement over path, mean and
    newest cosine between successive steps, newest change of the log step.
    """

    def __init__(self, windows: WindowSet, weights: int) -> None:
        self._weights = weights
        self._model = _logistic(_hand_made_features(windows, weights), windows)

    def probability_N(self, windows: WindowSet) -> Floats:
        """Its probabilities."""
        return _probability(self._model, _hand_made_features(windows, self._weights))


class Trees:
    """Gradient-boosted trees on the features of HandMade: scikit-learn's, with default settings, no early stopping.

    They use one thread. Several would add the same numbers in another order, which gives other trees.
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


def _hand_made_features(windows: WindowSet, weights: int) -> Features:
    tokens_NTD = kept_tokens(windows, PredictorConfig(weights=weights)).numpy()
    newest_ND = tokens_NTD[:, -1]
    oldest_step_N = tokens_NTD[:, 0, _COLUMN["log_step"]]
    mean_cosine_N = tokens_NTD[:, 1:, _COLUMN["cosine"]].mean(axis=1)  # the first step has none before it
    kept = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", *FEATURES)
    return np.column_stack([oldest_step_N, mean_cosine_N, newest_ND[:, [_COLUMN[name] for name in kept]]])


def _logistic(features_NF: Features, windows: WindowSet) -> Any:
    """A fitted pipeline. scikit-learn raises ValueError if all labels are the same: see `fit.check_windows`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(features_NF, windows.labels_N.numpy())


def _one_thread() -> Any:
    """A context in which OpenMP, which grows the trees, has one thread."""
    # scikit-learn depends on threadpoolctl.
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1, user_api="openmp")


def _probability(model: Any, features_NF: Features) -> Floats:
    probability_N: Floats = model.predict_proba(features_NF)[:, 1].astype(np.float64)
    return probability_N

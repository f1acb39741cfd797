"""What a search for better settings is judged on: families that the predictor was not trained on, never test runs."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from predictor.errors import UsageError
from predictor.model.network import PredictorConfig
from predictor.training.fit import FitConfig, fit_on
from predictor.training.metrics import auroc, average_precision
from predictor.training.splits import family_folds, places_of, split_by_run
from predictor.training.windows import WindowSet

_WIDEST_WINDOW = 16
SEARCHED = ("hide_clock", "scaling", "balance", "learning_rate", "weight_decay", "batch_size")
"""Fit settings that a study searches; the others are the user's, and part of what a study is."""
HANDED_ON = ("epochs", "patience", "epoch_windows", "validation", "test", "split_seed")
"""Those of the others that `train` must share: the settings were found for such trainings, and by another split the
runs that chose them would be tested on."""


@dataclass(frozen=True)
class TuneConfig:
    """How a study goes."""

    trials: int = 30
    """Trials that the study has at the end, those of earlier starts of the same command included."""
    timeout: float | None = None
    """Begin no trial after so many seconds."""
    folds: int = 4
    """Groups of families; each is left out of training once and judged."""
    score: Literal["auroc", "precision_not_yet"] = "auroc"
    """What to raise: AUROC, or the average precision of finding windows that may not be frozen yet."""
    prune: bool = True
    """Give a trial up when it falls below the median of the trials before it."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.folds < 2:
            raise UsageError(f"trials={self.trials}, folds={self.folds}: at least 1 trial and 2 folds")


@dataclass(frozen=True)
class Choice:
    """One trial's settings."""

    config: PredictorConfig
    settings: FitConfig
    learn_threshold: float
    """The key of the labels that it learns from, in `Task.windows`."""


class Task:
    """What trials are judged on: training and validation runs, families left out in turn, never the test runs.

    windows: the same runs labelled at each CKA threshold that a predictor may learn from; or, labelled by outcomes, at
        the tolerance alone.
    own: the key of those that all are judged by, whatever they learnt from: AUROC on labels of different rules cannot
        be compared. For the same reason windows whose newest snapshot comes before that of the widest window are left
        out of the judgement.
    labels: the flags of `train` that make these labels.
    """

    def __init__(
        self,
        windows: Mapping[float, WindowSet],
        own: float,
        labels: dict[str, float],
        config: TuneConfig,
        settings: FitConfig,
    ) -> None:
        self.windows = windows
        self.labels = labels
        self.config = config
        self.settings = settings
        self.own = own
        self.reference = windows[own]
        runs = self.reference.runs
        self._split = split_by_run(runs, settings.validation, settings.test, settings.split_seed)
        pool = [runs[place] for place in (*self._split.train, *self._split.validation)]
        self.folds = family_folds(pool, config.folds, settings.split_seed)
        self.widest = min(_WIDEST_WINDOW, *(len(run.labels_TL) for run in runs))
        self.most_weights = min(run.weights_TLK.shape[-1] for run in runs)
        self.described = {"runs": len(runs), "labels": self.labels, "folds": [list(fold) for fold in self.folds]}

    @property
    def fingerprint(self) -> str:
        """What must be the same for two starts to belong to one study: runs, labels, judging, what is fixed."""
        fixed = {name: value for name, value in asdict(self.settings).items() if name not in (*SEARCHED, "device")}
        identity = {
            "runs": sorted(run.run_id for run in self.reference.runs),
            "labels": [self.labels, sorted(self.windows), _digest(self.reference)],
            "judged": [self.config.folds, self.config.score, self.widest],
            "fixed": fixed,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def scores(self, choice: Choice, fold: int) -> list[float]:
        """The score of each family of a fold, from a predictor trained on the families of the others."""
        runs, left_out = self.reference.runs, self.folds[fold]
        held = set(places_of(runs, left_out))
        train = [place for place in self._split.train if place not in held]
        validation = [place for place in self._split.validation if place not in held]
        if not train or not validation:
            raise UsageError(f"without {', '.join(left_out)} no run is left to train or to validate on: gather more")
        judged = replace(self.reference, window=choice.config.window)
        learnt = replace(self.windows[choice.learn_threshold], window=choice.config.window)
        fitted = fit_on(learnt.subset(train), judged.subset(validation), choice.config, choice.settings)
        pool = (*self._split.train, *self._split.validation)
        found = [
            self._score(fitted.probability_N, judged.subset([place for place in pool if runs[place].family == family]))
            for family in left_out
        ]
        return [score for score in found if score is not None]

    def _score(self, probability_N: Callable[[WindowSet], Any], windows: WindowSet) -> float | None:
        comparable_N = (windows.index[:, 1] >= self.widest - 1).numpy()
        labels_N, probabilities_N = windows.labels_N.numpy()[comparable_N], probability_N(windows)[comparable_N]
        if self.config.score == "auroc":
            return auroc(labels_N, probabilities_N)
        return average_precision(~labels_N, 1 - probabilities_N)


def _digest(windows: WindowSet) -> str:
    """Of every label, in the order of the runs' ids: outcomes that were gathered anew may give others."""
    digest = hashlib.sha256()
    for run in sorted(windows.runs, key=lambda run: run.run_id):
        digest.update(np.ascontiguousarray(run.labels_TL.numpy()).tobytes())
    return digest.hexdigest()[:16]

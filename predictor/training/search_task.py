"""What a search tries and what it is scored on: the space of settings, and families left out of training."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.training.config import SEARCHED, FitConfig, TuneConfig
from predictor.training.dataset import WindowSet
from predictor.training.fit import fit_on
from predictor.training.metrics import auroc, average_precision
from predictor.training.splits import family_folds, runs_of, split_by_run

if TYPE_CHECKING:
    import optuna

_WEIGHTS = (32, 64, 128, 256, 512, 1024)
_WIDEST_WINDOW = 16


@dataclass(frozen=True)
class Choice:
    """One trial's settings."""

    config: PredictorConfig
    settings: FitConfig
    learn_threshold: float
    """The key, in `SearchTask.windows`, of the labels that it is trained on."""


class SearchTask:
    """What trials are scored on: the training and validation runs, with families left out in turn. Never test runs.

    Args:
        windows: the same runs labelled at each CKA threshold that a predictor may be trained on. With labels from
            outcomes, at the tolerance alone.
        own: the key of those that all trials are scored on, whatever they were trained on: AUROC on labels of different
            rules cannot be compared. For the same reason the score leaves out windows whose newest snapshot comes
            before that of the widest window.
        labels: the flags of `train` that make these labels.
        config: how the study goes.
        settings: the fit settings that are not searched.
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
        self._pool = (*self._split.train, *self._split.validation)
        self.folds = family_folds([runs[index] for index in self._pool], config.folds, settings.split_seed)
        self.widest = min(_WIDEST_WINDOW, *(len(run.labels_TL) for run in runs))
        self.most_weights = min(run.weights_TLK.shape[-1] for run in runs)
        self.described = {"runs": len(runs), "labels": self.labels, "folds": [list(fold) for fold in self.folds]}

    @property
    def fingerprint(self) -> str:
        """What two starts of one study must share: runs, labels, score, and the settings that are fixed."""
        fixed = {name: value for name, value in asdict(self.settings).items() if name not in (*SEARCHED, "device")}
        identity = {
            "runs": sorted(run.run_id for run in self.reference.runs),
            "labels": [self.labels, sorted(self.windows), _digest(self.reference)],
            "judged": [self.config.folds, self.config.score, self.widest],
            "fixed": fixed,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def scores(self, choice: Choice, fold: int) -> list[float]:
        """The score of each family of a fold, from a predictor that was trained on the families of the others."""
        runs, left_out = self.reference.runs, self.folds[fold]
        held = set(runs_of(runs, left_out))
        train = [index for index in self._split.train if index not in held]
        validation = [index for index in self._split.validation if index not in held]
        if not train or not validation:
            raise UsageError(f"without {', '.join(left_out)} no run is left to train or to validate on: gather more")
        scored = replace(self.reference, window=choice.config.window)
        learn_from = replace(self.windows[choice.learn_threshold], window=choice.config.window)
        fitted = fit_on(learn_from.subset(train), scored.subset(validation), choice.config, choice.settings)
        found = [
            self._score(fitted.probability_N, scored.subset([i for i in self._pool if runs[i].family == family]))
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
    """Of every label, in the order of the runs' ids: outcomes that were gathered anew may give other labels."""
    digest = hashlib.sha256()
    for run in sorted(windows.runs, key=lambda run: run.run_id):
        digest.update(np.ascontiguousarray(run.labels_TL.numpy()).tobytes())
    return digest.hexdigest()[:16]


def suggest(trial: "optuna.trial.BaseTrial", task: SearchTask) -> Choice:
    """One trial's settings from the search space.

    `weights` is some of those recorded. They are a random sample of a layer that holds as many. A smaller layer's
    weights are repeated, as they are while freezing.
    """
    config: dict[str, Any] = {
        "inputs": trial.suggest_categorical("inputs", ["gain", "motion", "raw"]),
        "window": trial.suggest_int("window", 3, task.widest),
        "weights": trial.suggest_categorical("weights", _weights(task)),
        "hidden": trial.suggest_categorical("hidden", [16, 32, 64, 128]),
        "key": trial.suggest_categorical("key", [8, 16, 32, 64]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
    }
    settings: dict[str, Any] = {
        "hide_clock": trial.suggest_float("hide_clock", 0.0, 0.7),
        "scaling": trial.suggest_categorical("scaling", ["standard", "robust", "none"]),
        "balance": trial.suggest_categorical("balance", [False, True]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 2e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 10.0, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256]),
    }
    several = len(task.windows) > 1
    learn_threshold = trial.suggest_categorical("learn_threshold", sorted(task.windows)) if several else task.own
    return Choice(PredictorConfig(**config), replace(task.settings, **settings), float(learn_threshold))


def default_settings(task: SearchTask) -> dict[str, Any]:
    """The settings that `train` has by default, as far as the recordings allow: those of the first trial."""
    config = asdict(PredictorConfig())
    config |= {"window": min(config["window"], task.widest), "weights": min(config["weights"], task.most_weights)}
    settings = {name: value for name, value in asdict(task.settings).items() if name in SEARCHED}
    return {**config, **settings, "learn_threshold": task.own}


def _weights(task: SearchTask) -> list[int]:
    return [count for count in _WEIGHTS if count < task.most_weights] + [task.most_weights]


def search_identity(task: SearchTask) -> str:
    """What the workers of a shared study must have in common: the task and, as their code may differ, the space."""
    import optuna

    trial = optuna.trial.FixedTrial(default_settings(task))
    suggest(trial, task)
    space = {name: repr(kind) for name, kind in trial.distributions.items()}
    return hashlib.sha256(json.dumps([task.fingerprint, space], sort_keys=True).encode()).hexdigest()[:12]

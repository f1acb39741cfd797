"""How a predictor is trained and how settings are searched. Imports no torch, so that `--help` answers at once."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from predictor.errors import UsageError
from predictor.shared.flags import option

CONTINUED_LEARNING_RATE = 0.0002
"""By default, for a predictor that is trained already: a tenth of a new one's, so that a few runs do not undo it."""

_LARGEST = 1e38
"""What single precision holds."""


@dataclass(frozen=True)
class FitConfig:
    """How a predictor is trained. Raises UsageError for a number out of range."""

    epochs: int = option(10, "Epochs at most")
    patience: int = option(5, "Stop after so many epochs without a lower validation loss")
    epoch_windows: int = option(
        4096,
        "Windows drawn for an epoch, at most; neighbouring windows overlap, so that all of them would say little more",
    )
    batch_size: int = option(128, "Windows in a batch")
    learning_rate: float = option(
        0.002, "AdamW's learning rate at the start; a cosine brings it to zero at the last epoch"
    )
    weight_decay: float = option(0.01, "AdamW's weight decay")
    hide_clock: float = option(
        0.3,
        "Share of training windows whose progress, depth and learning rate are hidden, so that the motion must be "
        "read: how a family's layers settle over time is soon memorised, and is different in the next family",
    )
    balance: bool = option(
        False, "Give both classes the same weight in the loss; the probabilities are then no longer those of the data"
    )
    scaling: Literal["standard", "robust", "none"] = option(
        "standard",
        "Inputs less their mean over their deviation; less their median over the distance of their quartiles; or "
        "unchanged",
    )
    false_freeze: float = option(
        0.02, "Threshold: the lowest at which at most this share of the freezes on the validation runs is false"
    )
    validation: float = option(0.2, "Share of the runs that choose the epoch and the threshold")
    test: float = option(0.2, "Share of the runs kept for the test")
    split_seed: int = option(0, "Seed of the split into training, validation and test runs")
    seed: int = option(0, "Seed of the first weights, the order and the dropout")
    device: str = option("auto", "auto (a GPU if there is one), cpu, or cuda:N")
    continue_from: str = option(
        "",
        "Go on from this predictor's weights and scaling: a file, or `shipped` for the one that ships; the learning "
        f"rate is then {CONTINUED_LEARNING_RATE} unless it is given",
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "epoch_windows", "batch_size"):
            _require(self, name, getattr(self, name) >= 1, "a whole number from 1")
        _require(self, "learning_rate", 0 < self.learning_rate <= _LARGEST, f"a number above 0, {_LARGEST:g} at most")
        largest = _LARGEST / max(self.learning_rate, 1.0)
        _require(self, "weight_decay", 0 <= self.weight_decay <= largest, f"a number from 0 to {largest:g}")
        for name in ("false_freeze", "hide_clock"):
            _require(self, name, 0 <= getattr(self, name) < 1, "a share from 0 to below 1")
        for name in ("validation", "test"):
            _require(self, name, 0 < getattr(self, name) < 1, "a share above 0 and below 1")
        _require(self, "seed", 0 <= self.seed < 2**64, "a whole number from 0 to below 2**64")


@dataclass(frozen=True)
class TuneConfig:
    """How a study goes. Raises UsageError for a number out of range."""

    trials: int = option(
        30, "Trials that the study has at the end, those of earlier starts of the same command included"
    )
    timeout: float | None = option(None, "Begin no trial after so many seconds")
    folds: int = option(4, "Groups of families; each is left out of training once and predicted")
    score: Literal["auroc", "precision_not_yet"] = option(
        "auroc", "What to raise: AUROC, or the average precision of finding windows that may not be frozen yet"
    )
    prune: bool = option(True, "Stop a trial early when it falls below the median of the trials before it")

    def __post_init__(self) -> None:
        _require(self, "trials", self.trials >= 1, "a whole number from 1")
        _require(self, "folds", self.folds >= 2, "a whole number from 2")
        good = self.timeout is None or 0 <= self.timeout < math.inf
        _require(self, "timeout", good, "a number of seconds from 0, or leave it out")


def _require(config: Any, name: str, is_good: bool, what: str) -> None:
    if not is_good:
        raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: give {what}")


SEARCHED = ("hide_clock", "scaling", "balance", "learning_rate", "weight_decay", "batch_size")
"""The fields of FitConfig that a study searches. The others are the user's, and part of what a study is."""
HANDED_ON = ("epochs", "patience", "epoch_windows", "validation", "test", "split_seed")
"""Those of the others that `train` must share: the settings were found for such trainings, and with another split the
runs that chose them would be test runs."""
CKA_LABEL_FLAGS = ("label_threshold", "label_dip", "learn_threshold")
"""Flags that say how windows are labelled by CKA."""
OUTCOME_LABEL_FLAG = "tolerance"
"""The flag that says how they are labelled by outcomes."""
NOTHING = "none"
"""In place of a file: nothing is held out."""

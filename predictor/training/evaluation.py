"""How a predictor and its baselines do on unseen runs: of known families, held out, and left out in turn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from predictor.errors import DivergedError, UsageError
from predictor.model.config import PredictorConfig
from predictor.training.baselines import Classifier, FromFeatures, HandMade, Majority, Trees
from predictor.training.config import FitConfig
from predictor.training.dataset import WindowSet
from predictor.training.fit import FitResult, fit_on
from predictor.training.metrics import Figures, calibration, choose_threshold, figures_of, mean_figures
from predictor.training.splits import Split, families_of, runs_of

CLASSIFIERS = ("majority", "clock", "progress", "learning rate", "depth", "hand-made", "trees", "attention")
"""majority: the training runs' share of freezable windows. clock: logistic regression on progress and depth. progress,
learning rate, depth: on that alone. hand-made: on features of the motion and the snapshot. trees: gradient-boosted
trees on the same features. attention: the predictor."""


@dataclass(frozen=True)
class Panel:
    """The predictor and its baselines. The same validation runs chose the threshold of each, by the same rule."""

    classifiers: dict[str, Classifier]
    thresholds: dict[str, float]

    def figures(self, windows: WindowSet, *groups: Sequence[int]) -> list[dict[str, Figures]]:
        """Each classifier's figures on all of `windows`, and on each group of its runs, given by their indices."""
        labels_N, run_N = windows.labels_N.numpy(), windows.index[:, 0].numpy()
        inside = [np.full(len(run_N), True), *(np.isin(run_N, indices) for indices in groups)]
        found: list[dict[str, Figures]] = [{} for _ in inside]
        for name, classifier in self.classifiers.items():
            probability_N = classifier.probability_N(windows)
            for figures, inside_N in zip(found, inside, strict=True):
                figures[name] = figures_of(labels_N[inside_N], probability_N[inside_N], self.thresholds[name])
        return found


def panel_of(windows: WindowSet, result: FitResult, settings: FitConfig, learn_from: WindowSet | None = None) -> Panel:
    """The predictor of `result`, and baselines that use its training and validation runs."""
    train, validation = (learn_from or windows).subset(result.split.train), windows.subset(result.split.validation)
    return _panel(result.fitted, train, validation, result.fitted.model.config, settings)


def known(panel: Panel, test: WindowSet) -> dict[str, Any]:
    """Figures on test runs of known families: `overall`, by `families`, and the predictor's `calibration`."""
    families = families_of(test.runs)
    overall, *parts = panel.figures(test, *(runs_of(test.runs, [family]) for family in families))
    return {
        "overall": overall,
        "families": dict(zip(families, parts, strict=True)),
        "calibration": calibration(test.labels_N.numpy(), panel.classifiers["attention"].probability_N(test)),
    }


def unseen(panel: Panel, windows: WindowSet) -> dict[str, Any]:
    """Figures on runs of families and sources that are held out from all training and tuning.

    Returns:
        `runs`, their number. If there are any, also the figures by classifier: `overall`, in `groups` by family and
        source, and their plain `mean` over the groups.
    """
    if not windows.runs:
        return {"runs": 0}
    kinds = [(run.family, run.source) for run in windows.runs]
    named = {kind: [index for index, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))}
    overall, *parts = panel.figures(windows, *named.values())
    groups = [
        {"family": family, "source": source, "runs": len(indices), "judges": figures}
        for ((family, source), indices), figures in zip(named.items(), parts, strict=True)
    ]
    mean = {name: mean_figures([part[name] for part in parts]) for name in panel.classifiers}
    return {"runs": len(kinds), "overall": overall, "groups": groups, "mean": mean}


def transfer(
    windows: WindowSet,
    split: Split,
    config: PredictorConfig,
    settings: FitConfig,
    *,
    learn_from: WindowSet | None = None,
    watch: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Leave each family out in turn: train on the training runs of all others, test on the test runs of that one.

    Args:
        windows: labelled windows of finished runs.
        split: their training, validation and test runs.
        config: what the predictors see, and their widths.
        settings: how they are trained.
        learn_from: the same runs with labels of another rule, to train on.
        watch: iterates over the families' names. It can show a progress bar.

    Returns:
        `families` (figures by classifier), their `mean`, and `left_out`: a reason for each family that cannot be
        tested.
    """
    families: dict[str, dict[str, Figures]] = {}
    left_out: dict[str, str] = {}
    for family in watch(families_of(windows.runs)):
        try:
            families[family] = _without(family, windows, learn_from or windows, split, config, settings)
        except (UsageError, DivergedError) as error:
            left_out[family] = str(error)
    mean = {name: mean_figures([row[name] for row in families.values()]) for name in CLASSIFIERS} if families else {}
    return {"families": families, "mean": mean, "left_out": left_out}


def _without(
    family: str,
    windows: WindowSet,
    learn_from: WindowSet,
    split: Split,
    config: PredictorConfig,
    settings: FitConfig,
) -> dict[str, Figures]:
    same = set(runs_of(windows.runs, [family]))
    test = [index for index in split.test if index in same]
    train = [index for index in split.train if index not in same]
    validation = [index for index in split.validation if index not in same]
    for part, indices in (("test run of its own", test), ("training run", train), ("validation run", validation)):
        if not indices:
            raise UsageError(f"no {part} is left: gather more runs")
    learn, choose = learn_from.subset(train), windows.subset(validation)
    attention = fit_on(learn, choose, config, settings)
    return _panel(attention, learn, choose, config, settings).figures(windows.subset(test))[0]


def _panel(
    attention: Classifier, train: WindowSet, validation: WindowSet, config: PredictorConfig, settings: FitConfig
) -> Panel:
    all_of_them: tuple[Classifier, ...] = (
        Majority(train),
        FromFeatures(train, "progress", "depth"),
        FromFeatures(train, "progress"),
        FromFeatures(train, "log_lr"),
        FromFeatures(train, "depth"),
        HandMade(train, config.weights),
        Trees(train, config.weights),
        attention,
    )
    classifiers = dict(zip(CLASSIFIERS, all_of_them, strict=True))
    labels_N = validation.labels_N.numpy()
    thresholds = {
        name: choose_threshold(labels_N, classifier.probability_N(validation), settings.false_freeze)
        for name, classifier in classifiers.items()
    }
    return Panel(classifiers, thresholds)

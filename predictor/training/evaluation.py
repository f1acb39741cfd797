"""How a predictor and its rivals do on runs they never saw: of families they know, of others, of a family left out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from predictor.errors import DivergedError, UsageError
from predictor.model.network import PredictorConfig
from predictor.training.baselines import FromSignals, HandMade, Judge, Majority, Trees
from predictor.training.fit import FitConfig, FitResult, fit_on
from predictor.training.metrics import Figures, calibration, choose_threshold, figures_of, mean_figures
from predictor.training.splits import Split, places_of
from predictor.training.windows import WindowSet

JUDGES = ("majority", "clock", "progress", "learning rate", "depth", "hand-made", "trees", "attention")
"""majority: the training runs' share of freezable windows. clock: logistic regression on progress and depth. progress,
learning rate, depth: on that alone. hand-made: on features of the motion and the signals. trees: gradient-boosted trees
on the same features. attention: the predictor."""


@dataclass(frozen=True)
class Panel:
    """The predictor and its rivals, each with a threshold that the same validation runs chose by the same rule."""

    judges: dict[str, Judge]
    thresholds: dict[str, float]

    def figures(self, windows: WindowSet, *groups: Sequence[int]) -> list[dict[str, Figures]]:
        """Each judge's figures on all of `windows`, and on each group of its runs, given by their places."""
        labels_N, run_N = windows.labels_N.numpy(), windows.index[:, 0].numpy()
        inside = [np.full(len(run_N), True), *(np.isin(run_N, places) for places in groups)]
        found: list[dict[str, Figures]] = [{} for _ in inside]
        for name, judge in self.judges.items():
            probability_N = judge.probability_N(windows)
            for figures, inside_N in zip(found, inside, strict=True):
                figures[name] = figures_of(labels_N[inside_N], probability_N[inside_N], self.thresholds[name])
        return found


def panel_of(windows: WindowSet, result: FitResult, settings: FitConfig, learn_from: WindowSet | None = None) -> Panel:
    """The predictor of `result` with rivals that learn from its training runs and choose by its validation runs."""
    train, validation = (learn_from or windows).subset(result.split.train), windows.subset(result.split.validation)
    return _panel(result.fitted, train, validation, result.fitted.model.config, settings)


def known(panel: Panel, test: WindowSet) -> dict[str, Any]:
    """Figures by judge on test runs of known families: `overall`, by `families`, and the predictor's `calibration`."""
    families = sorted({run.family for run in test.runs})
    overall, *parts = panel.figures(test, *(places_of(test.runs, [family]) for family in families))
    return {
        "overall": overall,
        "families": dict(zip(families, parts, strict=True)),
        "calibration": calibration(test.labels_N.numpy(), panel.judges["attention"].probability_N(test)),
    }


def unseen(panel: Panel, windows: WindowSet) -> dict[str, Any]:
    """Figures on runs of families and sources that are held out from all learning and tuning.

    Returns how many `runs` there are; where there are some also the figures by judge `overall`, in `groups` by family
    and source, and their plain `mean` over the groups.
    """
    if not windows.runs:
        return {"runs": 0}
    kinds = [(run.family, run.source) for run in windows.runs]
    named = {kind: [place for place, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds))}
    overall, *parts = panel.figures(windows, *named.values())
    groups = [
        {"family": family, "source": source, "runs": len(places), "judges": figures}
        for ((family, source), places), figures in zip(named.items(), parts, strict=True)
    ]
    mean = {name: mean_figures([part[name] for part in parts]) for name in panel.judges}
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
    """Leave one family out: train on the training runs of all others, test on the test runs of that one.

    watch: goes through the families' names; a place for a progress bar.

    Returns `families` (figures by judge), their `mean`, and `left_out`: a reason for each family that cannot be tested.
    """
    families: dict[str, dict[str, Figures]] = {}
    left_out: dict[str, str] = {}
    for family in watch(sorted({run.family for run in windows.runs})):
        try:
            families[family] = _without(family, windows, learn_from or windows, split, config, settings)
        except (UsageError, DivergedError) as error:
            left_out[family] = str(error)
    mean = {name: mean_figures([row[name] for row in families.values()]) for name in JUDGES} if families else {}
    return {"families": families, "mean": mean, "left_out": left_out}


def _without(
    family: str,
    windows: WindowSet,
    learn_from: WindowSet,
    split: Split,
    config: PredictorConfig,
    settings: FitConfig,
) -> dict[str, Figures]:
    same = set(places_of(windows.runs, [family]))
    test = [place for place in split.test if place in same]
    train = [place for place in split.train if place not in same]
    validation = [place for place in split.validation if place not in same]
    for part, places in (("test run of its own", test), ("training run", train), ("validation run", validation)):
        if not places:
            raise UsageError(f"no {part} is left: gather more runs")
    learn, choose = learn_from.subset(train), windows.subset(validation)
    attention = fit_on(learn, choose, config, settings)
    return _panel(attention, learn, choose, config, settings).figures(windows.subset(test))[0]


def _panel(
    attention: Judge, train: WindowSet, validation: WindowSet, config: PredictorConfig, settings: FitConfig
) -> Panel:
    rivals: tuple[Judge, ...] = (
        Majority(train),
        FromSignals(train, "progress", "depth"),
        FromSignals(train, "progress"),
        FromSignals(train, "log_lr"),
        FromSignals(train, "depth"),
        HandMade(train, config.weights),
        Trees(train, config.weights),
        attention,
    )
    judges = dict(zip(JUDGES, rivals, strict=True))
    labels_N = validation.labels_N.numpy()
    thresholds = {
        name: choose_threshold(labels_N, judge.probability_N(validation), settings.false_freeze)
        for name, judge in judges.items()
    }
    return Panel(judges, thresholds)

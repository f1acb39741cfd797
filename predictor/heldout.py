"""How a predictor does on runs that it never saw, beside the baselines: of known families, and of a family left out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from predictor.attention import PredictorConfig
from predictor.baselines import Clock, HandMade, Judge, Majority
from predictor.errors import DivergedError, UsageError
from predictor.fit import FitConfig, FitResult, fit_on
from predictor.metrics import Figures, calibration, choose_threshold, figures_of, mean_figures
from predictor.splits import Split, places_of
from predictor.windows import WindowSet

JUDGES = ("majority", "clock", "hand-made", "attention")
"""majority: the training runs' share of freezable windows. clock: logistic regression on progress and depth. hand-made:
logistic regression on features of the motion and the signals. attention: the predictor."""


@dataclass(frozen=True)
class Panel:
    """The predictor and its rivals, each with a threshold that the same validation runs chose by the same rule."""

    judges: dict[str, Judge]
    thresholds: dict[str, float]

    def figures(self, windows: WindowSet) -> dict[str, Figures]:
        """Each judge's figures on `windows`."""
        labels_N = windows.labels_N.numpy()
        return {
            name: figures_of(labels_N, judge.probability_N(windows), self.thresholds[name])
            for name, judge in self.judges.items()
        }


def held_out(
    windows: WindowSet, result: FitResult, settings: FitConfig, learn_from: WindowSet | None = None
) -> dict[str, Any]:
    """Figures on the test runs: `overall` and `families`, each by judge, and the predictor's `calibration`."""
    split, attention = result.split, result.fitted
    train, validation = (learn_from or windows).subset(split.train), windows.subset(split.validation)
    test = windows.subset(split.test)
    panel = _panel(attention, train, validation, attention.model.config, settings)
    families = sorted({run.family for run in test.runs})
    parts = {family: test.subset(places_of(test.runs, [family])) for family in families}
    return {
        "overall": panel.figures(test),
        "families": {family: panel.figures(part) for family, part in parts.items()},
        "calibration": calibration(test.labels_N.numpy(), attention.probability_N(test)),
    }


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
    return _panel(attention, learn, choose, config, settings).figures(windows.subset(test))


def _panel(
    attention: Judge, train: WindowSet, validation: WindowSet, config: PredictorConfig, settings: FitConfig
) -> Panel:
    rivals: tuple[Judge, ...] = (Majority(train), Clock(train), HandMade(train, config.weights), attention)
    judges = dict(zip(JUDGES, rivals, strict=True))
    labels_N = validation.labels_N.numpy()
    thresholds = {
        name: choose_threshold(labels_N, judge.probability_N(validation), settings.false_freeze)
        for name, judge in judges.items()
    }
    return Panel(judges, thresholds)

"""The work of `python -m predictor train`: fit, evaluate, write the predictor, its figures and its plots."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from predictor.model.config import PredictorConfig
from predictor.model.file import save_predictor
from predictor.model.sampling import SampleSpec
from predictor.shared.files import write_json
from predictor.shared.tracking import Tracker
from predictor.training import plots
from predictor.training.card import figures_text, provenance, training_data, why
from predictor.training.config import FitConfig
from predictor.training.continued import origin
from predictor.training.dataset import WindowSet
from predictor.training.evaluation import known, panel_of, transfer, unseen
from predictor.training.fit import FitResult, fit
from predictor.training.splits import HeldOut, families_of
from predictor.training.thresholds import with_risks


@dataclass(frozen=True)
class TrainingData:
    """What a predictor is trained and evaluated on."""

    windows: WindowSet
    spec: SampleSpec
    """How the runs were sampled."""
    held_out: HeldOut
    unseen: Callable[[int], WindowSet]
    """The held-out windows, for a number of snapshots. Called once, after the training."""
    files: Sequence[str]
    """Names of the files."""
    labels: dict[str, Any]
    """The flags that make the labels."""
    learn_from: WindowSet | None = None
    """The same runs with other labels, to train on. The figures use the labels of `windows`."""

    @property
    def has_costs(self) -> bool:
        """Whether it is known what freezing costs the runs."""
        return all(run.cost_TL is not None for run in self.windows.runs)


def train(
    data: TrainingData,
    config: PredictorConfig,
    settings: FitConfig,
    out: Path,
    *,
    with_transfer: bool,
    tracker: Tracker,
) -> None:
    """Train a predictor, write it to `out`, and metrics.json and plots to a folder beside it. Prints the figures.

    Args:
        data: the runs.
        config: what the predictor sees, and its widths. More weights than were recorded become as many.
        settings: how it is trained.
        out: the predictor's file.
        with_transfer: also leave out each family in turn.
        tracker: where figures go while it trains.

    Raises:
        UsageError: for data that cannot train a predictor.
        FileFault: for files that cannot be written.
    """
    config = _fitting(config, data.spec)
    result = fit(data.windows, data.spec, config, settings, learn_from=data.learn_from, tracker=tracker)
    card = _card(data, result, settings)
    if data.has_costs:
        families = _bar(families_of(data.windows.runs), "predicting each family by the others")
        result, risks = with_risks(result, data.windows, config, settings, families)
        card |= risks
    panel = panel_of(data.windows, result, settings, data.learn_from)
    card["test"] = known(panel, data.windows.subset(result.split.test))
    card["unseen"] = unseen(panel, data.unseen(config.window))
    # Written before the long part, so that an interruption loses nothing.
    save_predictor(out, result.file(card))
    if with_transfer:
        card["transfer"] = transfer(
            data.windows,
            result.split,
            config,
            settings,
            learn_from=data.learn_from,
            watch=lambda families: _bar(families, "leaving a family out"),
        )
        save_predictor(out, result.file(card))
    _write_figures(data.windows, result, card, out.with_suffix(""))
    if settings.continue_from:
        print(
            f"\nIt goes on from {settings.continue_from}. Figures on runs, families and sources that this one learned "
            "from are no test."
        )
    kept = f"epoch {result.fitted.best_epoch} of {len(result.fitted.history)} kept"
    print(f"\n{figures_text(card)}\n\n{kept}; freezes from probability {result.threshold:.4f}{why(card)}")
    print(f"written: {out}, and plots and metrics.json in {out.with_suffix('')}/")
    if not data.has_costs:
        print(
            "Its labels come from CKA, a proxy for what freezing costs. The predictor that ships learned from "
            "measured costs: python -m collect gather outcomes, then train --outcomes FILE"
        )
    figures = {f"test_{name}": value for name, value in card["test"]["overall"]["attention"].items()}
    tracker.log(figures, len(result.fitted.history))


def _fitting(config: PredictorConfig, spec: SampleSpec) -> PredictorConfig:
    if config.weights <= spec.weights:
        return config
    print(f"weights: {config.weights} asked for, {spec.weights} recorded: taking those")
    return replace(config, weights=spec.weights)


def _card(data: TrainingData, result: FitResult, settings: FitConfig) -> dict[str, Any]:
    return {
        "labels": data.labels,
        "held_out": asdict(data.held_out),
        "data": training_data(data.windows, asdict(result.split), data.files),
        **origin(settings),
        "training": {
            **{name: value for name, value in asdict(settings).items() if name != "continue_from"},
            "best_epoch": result.fitted.best_epoch,
            "epochs": len(result.fitted.history),
            "fit_seconds": result.fitted.fit_seconds,
        },
        "provenance": provenance(),
    }


def _write_figures(windows: WindowSet, result: FitResult, card: dict[str, Any], folder: Path) -> None:
    plots.learning_curve(result.fitted.history, result.fitted.best_epoch, folder / "learning_curve.png")
    plots.calibration_curve(card["test"]["calibration"], folder / "calibration.png")
    plots.families(card["test"], card.get("transfer"), folder / "families.png")
    runs = {part: [windows.runs[run].run_id for run in indices] for part, indices in asdict(result.split).items()}
    write_json(folder / "metrics.json", {**card, "split": runs, "history": result.fitted.history})


def _bar(families: list[str], doing: str) -> Iterable[str]:
    from tqdm import tqdm

    bar: Iterable[str] = tqdm(families, desc=doing, unit="family")
    return bar

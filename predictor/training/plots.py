"""Plots of a predictor's training and of a study, as PNG files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.shared.files import written_whole
from predictor.training.shared_search import best_trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _GREEN = "#3b6fb6", "#d9822b", "#8a8f98", "#4d9a6a"


def learning_curve(history: Sequence[dict[str, float | None]], best_epoch: int, path: Path) -> None:
    """Training and validation loss and validation AUROC by epoch. The epoch that was kept is marked."""
    figure = _figure(7, 3.6)
    losses, areas = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for column, colour in (("train_loss", _GREY), ("validation_loss", _BLUE)):
        losses.plot(epochs, [row[column] for row in history], color=colour, label=column.replace("_", " "))
    areas.plot(epochs, [_or_gap(row["validation_auroc"]) for row in history], color=_BLUE)
    for axes, title in ((losses, "binary cross entropy"), (areas, "validation AUROC")):
        axes.axvline(best_epoch, color=_ORANGE, linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set(title=title, xlabel="epoch")
    losses.legend(frameon=False)
    _save(figure, path)


def calibration_curve(bins: Sequence[dict[str, float]], path: Path) -> None:
    """The share of freezable windows at each predicted probability, on the test runs."""
    figure = _figure(4.4, 4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="perfect")
    axes.plot([row["predicted"] for row in bins], [row["observed"] for row in bins], color=_BLUE, marker="o")
    for row in bins:
        point = (row["predicted"], row["observed"])
        axes.annotate(f"{row['windows']:,.0f}", point, (7, -9), textcoords="offset points", fontsize=8, color=_GREY)
    axes.set(title="calibration on the test runs\n(windows at each point)", xlim=(-0.05, 1.15), ylim=(-0.08, 1.05))
    axes.set(xlabel="predicted", ylabel="share freezable")
    axes.legend(frameon=False)
    _save(figure, path)


def families(test: dict[str, Any], transfer: dict[str, Any] | None, path: Path) -> None:
    """AUROC on each family's test runs, for the predictor that knows it and for those trained without it."""
    never_seen = (transfer or {}).get("families", {})
    names = sorted(test["families"], reverse=True)
    series = [("attention, family known", _BLUE, "o", [_auroc(test["families"][name], "attention") for name in names])]
    if never_seen:
        shown = (("attention", _ORANGE, "D"), ("hand-made", _GREEN, "s"), ("clock", _GREY, "x"))
        series += [
            (f"{label}, family left out", colour, mark, [_auroc(never_seen.get(name, {}), label) for name in names])
            for label, colour, mark in shown
        ]
    figure = _figure(6.5, 1.6 + 0.35 * len(names))
    axes = figure.subplots()
    for label, colour, mark, areas in series:
        axes.scatter(areas, range(len(names)), color=colour, marker=mark, label=label, alpha=0.9)
    axes.axvline(0.5, color=_GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="AUROC on the test runs (.5: by guessing)", ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    _save(figure, path)


def study(study: Any, folder: Path) -> list[Path]:
    """An Optuna study's history, parameter importances and slices. A plot that needs more trials is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    written = []
    for name in ("optimization_history", "param_importances", "slice"):
        path = folder / f"{name}.png"
        with warnings.catch_warnings():  # Optuna calls its plots experimental
            warnings.simplefilter("ignore")
            try:
                # Without the order, equally important ones come in another order at each start.
                order = {"params": sorted(best_trial(study).params)} if name == "param_importances" else {}
                getattr(draw, f"plot_{name}")(study, **order)
                picture = pyplot.gcf()
                picture.set_size_inches(min(picture.get_figwidth(), 24), picture.get_figheight())
                _save(picture, path)
                written.append(path)
            except (ValueError, RuntimeError):  # too few trials, or all with the same score
                pass
            finally:
                pyplot.close("all")
    return written


def _figure(width: float, height: float) -> "Figure":
    # Not through pyplot, which would set the backend for the whole process.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=120, bbox_inches="tight")


def _or_gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _auroc(figures: dict[str, Any], name: str) -> float:
    return _or_gap(figures.get(name, {}).get("auroc"))

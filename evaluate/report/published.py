"""What the published trials show, for the README: a table that says what freezing saves, and a picture. Trains nothing.

The table has, for each kind of training, the settings of SmartFRZ that are of use there, and beside each the cheapest
rival that is at least as accurate. So a reader sees at once whether something simpler would have done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from evaluate.analysis.compute_multiplier import compute_multipliers, full_training_lengths
from evaluate.analysis.families import families
from evaluate.analysis.pareto import ROUNDING, unbeaten
from evaluate.analysis.statistics import Row, compare, overall
from evaluate.report.format import difference, lowest, multiplier
from evaluate.report.svg import FAINT, INK, colour, drawn, standalone
from evaluate.trials.adopt import published_results
from evaluate.trials.records import Results

PICTURE = Path(__file__).parents[1] / "results" / "accuracy_over_cost.svg"
_OWN = "smartfrz"
_SCHEDULES = ("static", "linear", "schedule")
_NOTE = """\
Means over paired seeds with 95 % intervals, to full training. Compute multiplier: FLOPs with which full training of the
best length is as accurate, over the policy's. Above the curve: more accurate than every length, so it is at least that;
below the curve: less accurate than the shortest length, so it is at most that. Lowest: of the networks. Cheapest rival:
of all other methods that lose no more; in bold where it saves no less."""
_LOWEST = -5.6
"""Percentage points below full training down to which the picture goes."""
_NAMES = {
    "none": "full training",
    "smartfrz": "SmartFRZ",
    "smartfrz, stop": "SmartFRZ, early stop",
    "smartfrz, cached": "SmartFRZ, feature cache",
    "smartfrz, risk 1, cached": "SmartFRZ at risk 1, feature cache",
    "smartfrz, risk 0.25, cached, stop": "SmartFRZ at risk 0.25, feature cache, early stop",
    "static 0.4, cached": "first 40 % frozen from the start, feature cache",
    "linear 0.7 to 0.95, stop": "frozen one by one from 70 to 95 % of the steps, early stop",
    "linear 0.4 to 0.8, cached, stop": "frozen one by one from 40 to 80 % of the steps, feature cache, early stop",
}
"""What the settings are called in plain words; the others have their labels."""


@dataclass(frozen=True)
class _Kind:
    """A kind of training, and the settings of SmartFRZ that the table shows for it."""

    suite: str
    title: str
    settings: tuple[str, ...]


_KINDS = (
    _Kind("standard", "from scratch", ("smartfrz, cached", "smartfrz", "smartfrz, stop")),
    _Kind("pretrained", "fine-tuning", ("smartfrz", "smartfrz, cached", "smartfrz, risk 1, cached")),
    _Kind("short", "fine-tuning, short", ("smartfrz", "smartfrz, cached", "smartfrz, risk 1, cached")),
    _Kind("converged", "to convergence", ("smartfrz, cached", "smartfrz, risk 0.25, cached, stop")),
)
_DRAWN = ("standard", "short", "pretrained", "converged")


def publish(picture: Path = PICTURE) -> str:
    """Write the picture, and return the table as Markdown."""
    results = {kind.suite: published_results(kind.suite) for kind in _KINDS}
    picture.write_text(_picture({kind.title: results[kind.suite] for kind in _KINDS if kind.suite in _DRAWN}))
    rows = [row for kind in _KINDS for row in _lines(kind, results[kind.suite])]
    header = (
        "training",
        "policy",
        "FLOPs saved",
        "accuracy, pp",
        "compute multiplier",
        "lowest",
        "cheapest rival as accurate",
    )
    return f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n{_NOTE}"


def _lines(kind: _Kind, results: Results) -> list[tuple[str, ...]]:
    """A line for each setting; the training's name stands in the first alone."""
    by_label = {row.policy: row for row in overall(compare(results))}
    multipliers = compute_multipliers(results)
    own = {label for family in families(results) if family.policy == _OWN for label in family.members}
    rivals = [row for label, row in by_label.items() if label not in own and not row.gap]
    lines: list[tuple[str, ...]] = []
    for label in kind.settings:
        row = by_label[label]
        what = kind.title if label == kind.settings[0] else ""
        accuracy = difference(row.difference) if row.difference else "-"
        found = multipliers.get((row.workload, label))
        lines.append((what, _name(label), _saved(row), accuracy, multiplier(found), lowest(found), _rival(row, rivals)))
    return lines


def _rival(row: Row, rivals: Sequence[Row]) -> str:
    """The cheapest of the rivals that lose no more; in bold where it saves no less, so that it is to be preferred."""
    as_accurate = [rival for rival in rivals if _lost(rival) <= _lost(row) + ROUNDING and _share(rival) < 1]
    if not as_accurate:
        return "none"
    best = min(as_accurate, key=_share)
    text = f"{_name(best.policy)}: {_saved(best)}, {-100 * _lost(best):+.2f}"
    return f"**{text}**" if _share(best) <= _share(row) else text


def _lost(row: Row) -> float:
    """Accuracy that a policy loses to full training, a share of 1."""
    return -row.difference.mean if row.difference else 0.0


def _share(row: Row) -> float:
    """Its FLOPs over those of full training."""
    return 1.0 if row.flops_share is None else row.flops_share


def _saved(row: Row) -> str:
    return f"{(1 - _share(row)) * 100:.0f} %"


def _name(label: str) -> str:
    length, _, how = label.partition(", ")
    kind, _, budget = length.partition(" ")
    if kind in ("shorter", "stopped"):
        what = "trained for" if kind == "shorter" else "stopped at"
        return f"{what} {float(budget) * 100:.0f} % of the steps{f' ({how})' if how else ''}"
    return _NAMES.get(label, label)


@dataclass(frozen=True)
class _Series:
    """Settings that share a colour."""

    name: str
    index: int
    """Among the colours of the report's figures."""
    line: str
    """matplotlib's line style through the unbeaten settings; empty for points alone."""
    marker: str


_SERIES = (
    _Series("SmartFRZ", 1, "-", "o"),
    _Series("training for fewer steps", 0, "--", "s"),
    _Series("layers frozen by a fixed schedule", 2, "-", "^"),
    _Series("other published methods", 0, "", "."),
)


def _picture(results: Mapping[str, Results]) -> str:
    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, (title, found) in zip(grid, results.items(), strict=True):
            _panel(axes, title, found)
        grid[0].set(ylim=(_LOWEST, 0.8), ylabel="accuracy against full training,\npercentage points")
        grid[0].annotate("full training", (102, 0.2), horizontalalignment="right", verticalalignment="bottom")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(_SERIES), frameon=False, columnspacing=1.4)
        figure.supxlabel("cost of the training, % of full training's FLOPs", y=0.12, fontsize="medium")
        figure.subplots_adjust(left=0.085, right=0.985, top=0.87, bottom=0.25, wspace=0.08)

    title = "Accuracy over training cost: SmartFRZ, training for fewer steps, fixed schedules and other methods"
    return standalone(drawn(3.7, draw, title, width=9.6))


def _panel(axes: Axes, title: str, results: Results) -> None:
    axes.set_title(f"{title.capitalize()}\n{len(results.workloads)} networks, {results.seed_count} seeds")
    axes.set(xlim=(27, 103), xticks=(40, 60, 80, 100))
    axes.axhline(0, color=FAINT, linewidth=1.2, zorder=0)
    for series, rows in zip(_SERIES, _split(results), strict=True):
        _draw_series(axes, series, rows)
    axes.plot(100, 0, color=INK, marker="X", markersize=7, linestyle="", zorder=5)


def _split(results: Results) -> list[list[Row]]:
    """The settings of each of the series."""
    rows = {row.policy: row for row in overall(compare(results)) if not row.gap}
    lengths = full_training_lengths(results)
    own = [label for family in families(results) if family.policy == _OWN for label in family.members]
    fixed = [label for family in families(results) if family.policy in _SCHEDULES for label in family.members]
    own, fixed = ([label for label in labels if "sieve" not in label] for labels in (own, fixed))
    others = [label for label in results.policies if label not in {*own, *lengths, *fixed} and "sieve" not in label]
    return [[rows[label] for label in labels if label in rows] for labels in (own, lengths, fixed, others)]


def _draw_series(axes: Axes, series: _Series, rows: Sequence[Row]) -> None:
    own = colour(series.index)
    shown = [row for row in rows if -100 * _lost(row) > _LOWEST]
    if not series.line:
        x, y = [100 * _share(row) for row in shown], [-100 * _lost(row) for row in shown]
        axes.plot(x, y, linestyle="", marker=series.marker, markersize=6, alpha=0.5, color=own, label=series.name)
        return
    best = unbeaten(rows, _share, lambda row: -_lost(row))
    x, y = [100 * _share(row) for row in best], [-100 * _lost(row) for row in best]
    axes.plot(x, y, color=own, marker=series.marker, markersize=5.5, linestyle=series.line, label=series.name, zorder=4)

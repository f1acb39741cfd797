"""The curve of accuracy over cost of each family of policies, a panel each, with all others behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluate.analysis.area import LOSS, FamilyArea
from evaluate.analysis.families import Family, families, rival
from evaluate.analysis.statistics import Row
from evaluate.report.format import shortened
from evaluate.report.panels import arrange, columns_for, height_for, letters_for, panel_grid
from evaluate.report.svg import BAND, Plot, colour, drawn, marker
from evaluate.report.tradeoff import PARTIAL, Point, cost_label, relative_points
from evaluate.trials.records import Results

_PER_FIGURE, _COLUMNS = 12, 3
_DEAREST = 130.0
"""Percent of the baseline's cost. What costs more stands at the edge, so that one expensive policy does not squeeze the
others."""


@dataclass(frozen=True)
class _Plane:
    """What all panels have in common."""

    curves: dict[Family, list[Point]]
    """The settings of each family, cheapest first."""
    rival: Family | None
    margin: float
    """Percentage points that may be lost."""
    right: float
    low: float
    high: float


def curve_plots(results: Results, rows: Sequence[Row], areas: Sequence[FamilyArea]) -> list[Plot]:
    """A panel a family, those with the largest area first, in figures of at most 12; empty without a family."""
    points = relative_points(results, rows)
    of_family = {family: [p for p in points if p.label in family.members] for family in families(results)}
    curves = {family: sorted(own, key=lambda p: p.cost.value) for family, own in of_family.items() if own}
    if not curves:
        return []
    ranked = [row.family for row in areas]
    other = rival(ranked, results.suite.against) if ranked else rival(list(curves))
    order = [*(family for family in ranked if family in curves), *(family for family in curves if family not in ranked)]
    plane = _plane(curves, other, results.suite.margin * 100)
    figures = -(-len(order) // _PER_FIGURE)
    lines = -(-len(order) // (figures * _COLUMNS))
    size = lines * _COLUMNS if figures > 1 else len(order)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    labels = (cost_label(results), "accuracy difference, pp")
    return [_plot(plane, part, labels, _title(part, areas)) for part in parts]


def _plane(curves: dict[Family, list[Point]], other: Family | None, margin: float) -> _Plane:
    """Scales that show what the area counts and what comes near, so that one bad policy does not flatten the others."""
    points = [point for own in curves.values() for point in own]
    right = min(max(100.0, *(point.cost.value for point in points)), _DEAREST) * 1.05
    gains = [0.0, *(point.accuracy.value for point in points)]
    low, high = max(min(gains), -1.5 * LOSS * 100), max(gains)
    room = 0.12 * max(high - low, margin, 0.1)
    return _Plane(curves, other, margin, right, low - room, high + room)


def _title(part: Sequence[Family], areas: Sequence[FamilyArea]) -> str:
    known = [(row.family.name, row.area.mean) for row in areas if row.family in part]
    if not known:
        return f"Without an area: {', '.join(shortened(family.name, 30) for family in part)}"
    first, *_, last = [f"{area:.2f} ({shortened(name, 40)})" for name, area in (known[0], known[-1])]
    return f"Areas from {first} to {last}" if len(known) > 1 else f"An area of {first}"


def _plot(plane: _Plane, part: Sequence[Family], labels: tuple[str, str], title: str) -> Plot:
    columns = columns_for(len(part))

    def draw(figure: Figure) -> None:
        grid = panel_grid(figure, len(part), columns)
        for axes, family in zip(grid.flat, part, strict=False):
            axes.set_title(shortened(family.name, letters_for(columns)))
            _panel(axes, plane, family)
        grid[0][0].set(xlim=(0, plane.right), ylim=(plane.low, plane.high))
        for axes in grid.flat:  # numbers inside of their panel, so that those of two panels do not become one
            zero, _, full = axes.set_xticks([0, 50, 100])
            zero.label1.set_horizontalalignment("left")
            full.label1.set_horizontalalignment("right")
        arrange(figure, grid, len(part), *labels)

    svg = drawn(max(2.4, height_for(len(part), columns)), draw, f"Families: {title}")
    dashed = f" Dashed: {shortened(plane.rival.name, 40)}." if plane.rival else ""
    note = (
        "In colour: a family, a point for each setting; whiskers: 95 % intervals over paired seeds. Grey: the other "
        f"families.{dashed} Cross: the baseline. Hollow, at an edge: lies beyond it. Shaded: more than "
        f"{plane.margin:g} percentage points lost."
    )
    if any(not point.whole for family in part for point in plane.curves[family]):
        note = f"{note} {PARTIAL}"
    return Plot(title, svg, note)


def _panel(axes: Axes, plane: _Plane, family: Family) -> None:
    """One family in colour before the others in grey, the rival dashed and the baseline."""
    axes.axhspan(plane.low, -plane.margin, color=BAND, linewidth=0)
    behind: list[tuple[float, float]] = []
    for other, points in plane.curves.items():
        if other not in (family, plane.rival):
            behind += [*_line(points), (math.nan, math.nan)]  # one path for all, with gaps in it
    if behind:
        x, y = zip(*behind, strict=True)
        axes.plot(x, y, color=colour(0), linewidth=0.9, marker=".", markersize=3, alpha=0.35)
    if plane.rival is not None and plane.rival != family:
        x, y = zip(*_line(plane.curves[plane.rival]), strict=True)
        axes.plot(x, y, color=colour(0), linewidth=1.2, linestyle=(0, (3, 2)), marker=".", markersize=5)
    axes.plot(100, 0, color=colour(0), marker=marker(0), markersize=5)
    _own(axes, plane, plane.curves[family])


def _own(axes: Axes, plane: _Plane, points: Sequence[Point]) -> None:
    """A family's line, and its points with their whiskers."""
    look, shape = colour(points[0].index), marker(points[0].index)
    axes.plot(*zip(*_line(points), strict=True), color=look)
    for point in points:
        cost, accuracy = point.cost, point.accuracy
        x, y = min(cost.value, plane.right), max(accuracy.value, plane.low)
        if (x, y) == (cost.value, accuracy.value):
            xerr = [[x - cost.low], [cost.high - x]]
            yerr = [[y - accuracy.low], [accuracy.high - y]]
            fill = "full" if point.whole else "none"
            kind: dict[str, Any] = {"color": look, "marker": shape, "markersize": 4, "fillstyle": fill}
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=1.0, zorder=3, **kind)
        else:
            axes.plot(x, y, color=look, marker=shape, markersize=4, markerfacecolor="none", clip_on=False, zorder=3)


def _line(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(point.cost.value, point.accuracy.value) for point in points]

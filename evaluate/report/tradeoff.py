"""Accuracy against training cost in one plane: a point with intervals for each policy, and the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from evaluate.analysis.area import LOSS
from evaluate.analysis.families import MANY, colour_indices
from evaluate.analysis.pareto import unbeaten
from evaluate.analysis.statistics import Row, overall, percentage_points
from evaluate.report.format import shortened
from evaluate.report.labels import Label, label_points
from evaluate.report.svg import BAND, INK, Plot, colour, drawn, marker
from evaluate.trials.records import COST_AXES, Results

_HEIGHT = 3.7
_DEEPEST = 300 * LOSS
"""Percentage points below what may be lost that the plane still shows. What lost more is drawn at its edge, so that one
policy that learned nothing does not squeeze the others."""
PARTIAL = "Hollow: trainings are missing from its means or were lost, so that it has no rank."


@dataclass(frozen=True)
class Span:
    """A value with its interval; without one, both ends are the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A policy in the plane of cost and accuracy."""

    index: int
    """Among the colours: 0 for the baseline, then one for all settings of a family."""
    label: str
    cost: Span
    accuracy: Span
    whole: bool = True
    """Whether its means leave nothing out; otherwise it is shown, and not ranked."""


def overall_plot(results: Results, rows: Sequence[Row]) -> Plot:
    """All workloads together, relative to the baseline."""
    points = relative_points(results, rows)
    title = _unbeaten(points)
    axes = (cost_label(results), "accuracy difference, pp")
    note = (
        f"Cost in {COST_AXES[results.suite.cost]}. Whiskers: 95 % intervals over paired seeds. Dashed: the Pareto "
        f"front of the means. Shaded: more than {percentage_points(results.suite.margin)} lost."
    )
    svg = _draw(points, axes, -results.suite.margin * 100, f"All workloads: {title}")
    return Plot(title, svg, f"{note} {_looks(points, -results.suite.margin * 100)}".strip())


def relative_points(results: Results, rows: Sequence[Row]) -> list[Point]:
    """Every policy over all workloads: cost in percent of the baseline's, accuracy in pp above the baseline's."""
    return _points(results, overall(rows), cost_unit=100.0, accuracy_zero=0.0)


def cost_label(results: Results) -> str:
    """The axis label of such a cost."""
    return f"training cost, % of {shortened(results.suite.baseline, 20)}"


def workload_plot(results: Results, rows: Sequence[Row], workload: str) -> Plot | None:
    """One workload in its own units; None where the baseline has no finished training."""
    baseline = results.suite.baseline
    trials = [trial for trial in results.cell(workload, baseline).values() if trial.status == "finished"]
    costs = [cost for cost in (trial.cost(results.suite.cost) for trial in trials) if cost]
    accuracies = [trial.accuracy for trial in trials if trial.accuracy is not None]
    if not costs or not accuracies:
        return None
    zero = fmean(accuracies) * 100
    points = _points(results, [row for row in rows if row.workload == workload], fmean(costs), zero)
    title = _unbeaten(points)
    labels = (f"training cost, {COST_AXES[results.suite.cost]}", "test accuracy, %")
    floor = zero - results.suite.margin * 100
    svg = _draw(points, labels, floor, f"{workload}: {title}")
    return Plot(title, svg, _looks(points, floor))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those whole points that no other matches in cost and accuracy and beats in one of them, cheapest first."""
    whole = [point for point in points if point.whole]
    return unbeaten(whole, lambda point: point.cost.value, lambda point: point.accuracy.value)


def _looks(points: Sequence[Point], floor: float) -> str:
    """What the points' looks mean; empty if each point has a look of its own and its name."""
    parts = []
    if len({point.index for point in points}) < len(points):
        parts.append("Markers that look alike are settings of one policy.")
    if len(points) > MANY:
        parts.append("Named, and with whiskers: those on the Pareto front.")
    if any(_beyond(point, floor) for point in points):
        parts.append("Hollow, at the edge: lies beyond it.")
    if any(not point.whole for point in points):
        parts.append(PARTIAL)
    return " ".join(parts)


def _unbeaten(points: Sequence[Point]) -> str:
    names = [shortened(point.label, 40) for point in pareto(points)]
    if not names:
        return "Nothing to compare yet"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"Not beaten in both accuracy and cost: {', '.join(names[:5])}{more}"


def _points(results: Results, rows: Sequence[Row], cost_unit: float, accuracy_zero: float) -> list[Point]:
    """The baseline at (cost_unit, accuracy_zero), and every policy that has a pair, in relation to it."""
    known, points = colour_indices(results), []
    for row in rows:
        if row.policy == results.suite.baseline and row.accuracy is not None:
            cost, accuracy = Span(*[cost_unit] * 3), Span(*[accuracy_zero] * 3)
        elif row.difference and row.speedup:
            dear, cheap = row.speedup.low, row.speedup.high
            ends = (cost_unit / cheap, cost_unit / dear) if row.speedup.bounded else [cost_unit / row.speedup.mean] * 2
            cost = Span(cost_unit / row.speedup.mean, *ends)
            gap = row.difference
            span = (gap.mean, gap.low, gap.high) if gap.bounded else [gap.mean] * 3
            accuracy = Span(*(accuracy_zero + 100 * value for value in span))
        else:
            continue
        points.append(Point(known[row.policy], row.policy, cost, accuracy, not row.gap))
    return points


def _beyond(point: Point, floor: float) -> bool:
    return point.accuracy.value < floor - _DEEPEST


def _draw(points: Sequence[Point], labels: tuple[str, str], floor: float, title: str) -> str:
    shown, beyond = ([p for p in points if _beyond(p, floor) is is_beyond] for is_beyond in (False, True))

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if points:
            axes.set_xlim(_limits([point.cost for point in points], 0.0))
            axes.set_ylim(_limits([point.accuracy for point in shown or points], -math.inf))
            axes.axhspan(min(floor, axes.get_ylim()[0]) - 1.0, floor, color=BAND, linewidth=0)
        front = pareto(shown)
        named = front if len(points) > MANY else shown
        _front(axes, front)
        for point in shown:
            _point(axes, point, whole=point in named)
        for point in beyond:
            look: dict[str, Any] = {"color": colour(point.index), "marker": marker(point.index), "fillstyle": "none"}
            axes.plot(point.cost.value, axes.get_ylim()[0], markersize=6, clip_on=False, **look)
        if named is shown:
            _join(axes, shown)
        _label(figure, axes, shown, named)

    return drawn(_HEIGHT, draw, title)


def _limits(spans: Sequence[Span], least: float) -> tuple[float, float]:
    """Limits that show every value, and as much of the intervals as leaves the values apart.

    An interval from two seeds can be a hundred times as wide as the distances between the policies.
    """
    values = [span.value for span in spans]
    spread = max(values) - min(values) or abs(values[0]) * 0.05 or 1.0
    low = max(min(span.low for span in spans), min(values) - spread)
    high = min(max(span.high for span in spans), max(values) + spread)
    room = 0.08 * (high - low) or spread
    return max(low - room, least), high + room


def _front(axes: Axes, front: Sequence[Point]) -> None:
    axes.step(
        [point.cost.value for point in front],
        [point.accuracy.value for point in front],
        where="post",
        color=INK,
        linewidth=1.0,
        linestyle=(0, (4, 3)),
    )


def _steps(axes: Axes, front: Sequence[Point]) -> list[Bbox]:
    """The Pareto front's lines as boxes that no label should cross."""
    boxes = []
    for point, after in pairwise(front):
        (x, y), (right, top) = axes.transData.transform(
            [(point.cost.value, point.accuracy.value), (after.cost.value, after.accuracy.value)]
        )
        boxes += [Bbox.from_extents(x, y - 1, right, y + 1), Bbox.from_extents(right - 1, y, right + 1, top)]
    return boxes


def _join(axes: Axes, points: Sequence[Point]) -> None:
    """A thin line through the settings of each family, cheapest first."""
    for index in {point.index for point in points}:
        own = sorted((p.cost.value, p.accuracy.value) for p in points if p.index == index)
        if len(own) > 1:
            axes.plot(*zip(*own, strict=True), color=colour(index), linewidth=0.9, alpha=0.6)


def _point(axes: Axes, point: Point, *, whole: bool) -> None:
    """A marker; the whole point has its whiskers too, and stands before those that have none."""
    cost, accuracy = point.cost, point.accuracy
    look: dict[str, Any] = {"color": colour(point.index), "marker": marker(point.index)}
    look |= {} if point.whole else {"fillstyle": "none"}
    if not whole:
        axes.plot(cost.value, accuracy.value, markersize=5, alpha=0.6, zorder=2, **look)
        return
    axes.errorbar(
        cost.value,
        accuracy.value,
        xerr=[[cost.value - cost.low], [cost.high - cost.value]],
        yerr=[[accuracy.value - accuracy.low], [accuracy.high - accuracy.value]],
        markersize=7,
        elinewidth=1.3,
        zorder=3,
        **look,
    )


def _label(figure: Figure, axes: Axes, points: Sequence[Point], named: Sequence[Point]) -> None:
    """Name each of these points where there is room beside it; the tables name them all."""
    figure.draw_without_rendering()
    taken = [box for point in named for box in _boxes(axes, point)] + _steps(axes, pareto(points))
    taken += [_boxes(axes, point)[0] for point in points if point not in named]
    labels = [Label(p.cost.value, p.accuracy.value, shortened(p.label, 22), colour(p.index)) for p in named]
    label_points(axes, labels, taken)


def _boxes(axes: Axes, point: Point) -> list[Bbox]:
    """A point's marker and its two whiskers, on the canvas."""
    to_canvas = axes.transData.transform
    x, y = to_canvas((point.cost.value, point.accuracy.value))
    left, low = to_canvas((point.cost.low, point.accuracy.low))
    right, high = to_canvas((point.cost.high, point.accuracy.high))
    extents = ((x - 5, y - 5, x + 5, y + 5), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high))
    return [Bbox.from_extents(*sides) for sides in extents]

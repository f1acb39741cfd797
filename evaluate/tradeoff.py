"""Accuracy against training cost: a point with intervals for each policy, and the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from evaluate.results import COST_AXES, Results
from evaluate.statistics import Row, overall
from evaluate.svg import BAND, INK, Plot, colour, drawn, marker
from evaluate.table import shortened

_HEIGHT = 3.7
# Where a label may stand beside its point: offset in points, horizontal and vertical alignment.
_SIDES = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (6, 3, "left", "bottom"),
    (6, -3, "left", "top"),
    (-6, 3, "right", "bottom"),
    (-6, -3, "right", "top"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
)


@dataclass(frozen=True)
class Span:
    """A value with its interval; without one, both ends are the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A policy in the plane of cost and accuracy."""

    place: int
    label: str
    cost: Span
    accuracy: Span


def overall_plot(results: Results, rows: Sequence[Row]) -> Plot:
    """All workloads together, relative to the baseline."""
    points = _points(results, overall(rows), cost_unit=100.0, accuracy_zero=0.0)
    title = _unbeaten(points)
    axes = (f"training cost, % of {shortened(results.suite.baseline, 20)}", "accuracy difference, points")
    note = (
        f"Cost in {COST_AXES[results.suite.cost]}. Whiskers: 95 % intervals over paired seeds. Dashed: the Pareto "
        f"front of the means. Shaded: more than {results.suite.margin * 100:g} points lost."
    )
    return Plot(title, _draw(points, axes, -results.suite.margin * 100, f"All workloads: {title}"), note)


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
    return Plot(title, _draw(points, labels, zero - results.suite.margin * 100, f"{workload}: {title}"))


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those points that no other matches in cost and accuracy and beats in one of them, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost.value, -point.accuracy.value)):
        if not front or point.accuracy.value > front[-1].accuracy.value:
            front.append(point)
    return front


def _unbeaten(points: Sequence[Point]) -> str:
    names = [shortened(point.label, 40) for point in pareto(points)]
    if not names:
        return "Nothing to compare yet"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"Not beaten in both accuracy and cost: {', '.join(names[:5])}{more}"


def _points(results: Results, rows: Sequence[Row], cost_unit: float, accuracy_zero: float) -> list[Point]:
    """The baseline at (cost_unit, accuracy_zero), and every policy that has a pair, in relation to it."""
    points = []
    for row in rows:
        place = results.policies.index(row.policy)
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
        points.append(Point(place, row.policy, cost, accuracy))
    return points


def _draw(points: Sequence[Point], labels: tuple[str, str], floor: float, title: str) -> str:
    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if points:
            axes.set_xlim(_limits([point.cost for point in points], 0.0))
            axes.set_ylim(_limits([point.accuracy for point in points], -math.inf))
            axes.axhspan(min(floor, axes.get_ylim()[0]) - 1.0, floor, color=BAND, linewidth=0)
        _front(axes, pareto(points))
        for point in points:
            _point(axes, point)
        _label(figure, axes, points)

    return drawn(_HEIGHT, draw, title)


def _limits(spans: Sequence[Span], least: float) -> tuple[float, float]:
    """Limits that show every value, and as much of the intervals as leaves the values apart.

    An interval from two seeds can be a hundred times as wide as the distances between the policies.
    """
    values = [span.value for span in spans]
    spread = max(values) - min(values) or abs(values[0]) * 0.05 or 1.0
    low = max(min(span.low for span in spans), min(values) - spread)
    high = min(max(span.high for span in spans), max(values) + spread)
    return max(low - 0.08 * (high - low), least), high + 0.08 * (high - low)


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
    """The front's lines as boxes that no label should cross."""
    boxes = []
    for point, after in pairwise(front):
        (x, y), (right, top) = axes.transData.transform(
            [(point.cost.value, point.accuracy.value), (after.cost.value, after.accuracy.value)]
        )
        boxes += [Bbox.from_extents(x, y - 1, right, y + 1), Bbox.from_extents(right - 1, y, right + 1, top)]
    return boxes


def _point(axes: Axes, point: Point) -> None:
    cost, accuracy = point.cost, point.accuracy
    axes.errorbar(
        cost.value,
        accuracy.value,
        xerr=[[cost.value - cost.low], [cost.high - cost.value]],
        yerr=[[accuracy.value - accuracy.low], [accuracy.high - accuracy.value]],
        color=colour(point.place),
        marker=marker(point.place),
        markersize=7,
        elinewidth=1.3,
        zorder=3,
    )


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Name each point where there is room beside it; the legend names them all."""
    figure.draw_without_rendering()
    taken = [box for point in points for box in _boxes(axes, point)] + _steps(axes, pareto(points))
    for point in points:
        for x, y, horizontal, vertical in _SIDES:
            text = axes.annotate(
                shortened(point.label, 22),
                (point.cost.value, point.accuracy.value),
                (x, y),
                textcoords="offset points",
                horizontalalignment=horizontal,
                verticalalignment=vertical,
                color=colour(point.place),
                in_layout=False,
            )
            box = text.get_window_extent()
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _boxes(axes: Axes, point: Point) -> list[Bbox]:
    """A point's marker and its two whiskers, on the canvas."""
    to_canvas = axes.transData.transform
    x, y = to_canvas((point.cost.value, point.accuracy.value))
    left, low = to_canvas((point.cost.low, point.accuracy.low))
    right, high = to_canvas((point.cost.high, point.accuracy.high))
    extents = ((x - 5, y - 5, x + 5, y + 5), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high))
    return [Bbox.from_extents(*sides) for sides in extents]

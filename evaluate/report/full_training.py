"""The curve of full training at its lengths, and the policies beside it: what compute multipliers are read from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from evaluate.analysis.compute_multiplier import (
    Multiplier,
    flops_on_curve,
    full_training_curve,
    full_training_lengths,
    policy_point,
)
from evaluate.analysis.families import colour_indices
from evaluate.analysis.pareto import unbeaten
from evaluate.report.format import bound, plain, shortened
from evaluate.report.labels import Label, label_points
from evaluate.report.svg import FAINT, INK, Plot, colour, drawn, marker
from evaluate.trials.records import Results

_HEIGHT = 3.9
_NAMED = 6
"""Policies whose names and multipliers stand in the figure, those with the largest; the tables have all."""
_ROOM, _LEAST_ROOM = 0.5, 1.0
"""How far below the shortest length the figure reaches at most: a share of what lies between the lengths' accuracies,
or that many percentage points. So a policy that learned nothing does not squeeze the others."""


@dataclass(frozen=True)
class Spot:
    """A training in the plane of a figure."""

    label: str
    cost: float
    """FLOPs in percent of the baseline's."""
    accuracy: float
    """Percentage points above the baseline's."""


@dataclass(frozen=True)
class CurvePlane:
    """Full training's curve and the policies, on one workload or in the mean over several."""

    curve: tuple[Spot, ...]
    """Cheapest first."""
    beaten: tuple[Spot, ...]
    """Lengths that another one beats in both cost and accuracy."""
    policies: tuple[Spot, ...]


def full_training_plot(
    results: Results, found: Mapping[tuple[str | None, str], Multiplier], workload: str | None
) -> Plot | None:
    """The figure of a workload, or of the mean over all for None; None where there is no curve.

    found: what `compute_multipliers` found.
    """
    plane = curve_plane(results, workload)
    if plane is None:
        return None
    multipliers = {policy: each for (of, policy), each in found.items() if of == workload}
    several = workload is None and len(results.workloads) > 1
    title = _title(plane, multipliers)
    where = "All workloads" if workload is None else plain(workload)
    svg = _draw(plane, multipliers, colour_indices(results), f"{where}, full training's curve: {title}", not several)
    return Plot(title, svg, _note(plane, several))


def curve_plane(results: Results, workload: str | None) -> CurvePlane | None:
    """The means over seeds relative to the baseline's; over all workloads: the means of those of each.

    A policy or a length that one of the workloads lacks is left out of the mean over all.
    """
    names = results.workloads if workload is None else (workload,)
    planes = [_relative(results, name) for name in names]
    found = [plane for plane in planes if plane is not None]
    if not found or len(found) < len(planes):
        return None
    labels = [label for label in results.policies if all(label in plane for plane in found)]
    spots = [Spot(label, *map(fmean, zip(*(plane[label] for plane in found), strict=True))) for label in labels]
    lengths = set(full_training_lengths(results))
    of_length = [spot for spot in spots if spot.label in lengths]
    curve = unbeaten(of_length, lambda spot: spot.cost, lambda spot: spot.accuracy)
    beaten = tuple(spot for spot in of_length if spot not in curve)
    return CurvePlane(tuple(curve), beaten, tuple(spot for spot in spots if spot.label not in lengths))


def _relative(results: Results, workload: str) -> dict[str, tuple[float, float]] | None:
    """Each policy's cost in percent of the baseline's and its difference in accuracy in percentage points."""
    curve = full_training_curve(results, workload)
    if curve is None:
        return None
    others = set(full_training_lengths(results)) - {point.label for point in (*curve.points, *curve.beaten)}
    labels = [label for label in results.policies if label not in others]
    points = {label: policy_point(results, workload, label, curve) for label in labels}
    full = points[results.suite.baseline]
    assert full is not None  # the curve's seeds are those with which the baseline finished
    return {
        label: (100 * point.flops / full.flops, 100 * (point.accuracy - full.accuracy))
        for label, point in points.items()
        if point is not None
    }


def _title(plane: CurvePlane, multipliers: Mapping[str, Multiplier]) -> str:
    found = [multipliers[spot.label] for spot in plane.policies if spot.label in multipliers]
    better = sum(each.value.mean > 1 and not each.at_most for each in found)
    return f"Compute multiplier above 1: {better} of {len(found)} policies" if found else "Full training's curve"


def _note(plane: CurvePlane, several: bool) -> str:
    note = "Line: full training of the best length at each cost. "
    if plane.beaten:
        note += "Crosses: lengths that another one beats. "
    note += (
        "Left of the line a policy beats training for fewer steps. Means over the workloads; a multiplier is taken on "
        "each workload's own curve and may differ from what is seen here."
        if several
        else "Thin: how much more full training spends to be as accurate; the number is the compute multiplier, of the "
        "policy's own seeds where it has fewer."
    )
    if any(_below(plane, spot) for spot in plane.policies):
        note += " Hollow, at the edge: lies below it."
    return note


def _floor(plane: CurvePlane) -> float:
    """The lowest accuracy that is shown."""
    lowest, highest = plane.curve[0].accuracy, plane.curve[-1].accuracy
    spots = (*plane.curve, *plane.beaten, *plane.policies)
    least, most = min(spot.accuracy for spot in spots), max(spot.accuracy for spot in spots)
    deepest = lowest - max(_ROOM * (highest - lowest), _LEAST_ROOM)
    return max(deepest, least - 0.08 * (most - least or 1.0))


def _below(plane: CurvePlane, spot: Spot) -> bool:
    return spot.accuracy < _floor(plane)


def _draw(
    plane: CurvePlane, multipliers: Mapping[str, Multiplier], colours: Mapping[str, int], title: str, connect: bool
) -> str:
    ranked = sorted(
        (spot for spot in plane.policies if spot.label in multipliers and not _below(plane, spot)),
        key=lambda spot: -multipliers[spot.label].value.mean,
    )
    named = ranked[:_NAMED]

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        axes.set(xlabel="FLOPs, % of full training's", ylabel="accuracy difference, pp")
        lengths = [(spot.cost, spot.accuracy) for spot in plane.curve]
        axes.plot(*zip(*lengths, strict=True), color=INK, linewidth=1.6, marker="o", markersize=4, zorder=4)
        for spot in plane.beaten:
            axes.plot(spot.cost, spot.accuracy, color=colour(0), marker="x", markersize=5)
        connectors = {
            spot: [(spot.cost, spot.accuracy), (flops_on_curve(lengths, spot.accuracy)[0], spot.accuracy)]
            for spot in (named if connect else ())
        }
        for spot, line in connectors.items():
            axes.plot(*zip(*line, strict=True), color=colour(colours[spot.label]), linewidth=0.8, zorder=1)
        for spot in plane.policies:
            _policy(axes, plane, spot, colours[spot.label], bold=spot in named)
        axes.margins(x=0.12, y=0.12)
        axes.set_ylim(bottom=_floor(plane))
        axes.axvline(100, color=FAINT, zorder=0)
        figure.draw_without_rendering()
        taken = [
            *_markers(axes, [*plane.curve, *plane.beaten, *named]),
            *(box for line in [lengths, *connectors.values()] for box in _along(axes, line)),
        ]
        label_points(axes, _labels(plane, named, multipliers, colours), taken)

    return drawn(_HEIGHT, draw, title)


def _policy(axes: Axes, plane: CurvePlane, spot: Spot, index: int, *, bold: bool) -> None:
    look: dict[str, Any] = {"color": colour(index), "marker": marker(index), "linestyle": ""}
    if _below(plane, spot):
        axes.plot(spot.cost, _floor(plane), markersize=6, fillstyle="none", clip_on=False, **look)
    else:
        axes.plot(spot.cost, spot.accuracy, markersize=7 if bold else 5, alpha=1.0 if bold else 0.5, zorder=3, **look)


def _labels(
    plane: CurvePlane, named: Sequence[Spot], multipliers: Mapping[str, Multiplier], colours: Mapping[str, int]
) -> list[Label]:
    """The lengths' names, then the named policies' with their multipliers."""
    lengths = [
        Label(spot.cost, spot.accuracy, shortened(spot.label, 18), look, always=True)
        for spots, look in ((plane.curve, INK), (plane.beaten, colour(0)))
        for spot in spots
    ]
    few = len(plane.policies) <= _NAMED
    policies = [
        Label(spot.cost, spot.accuracy, _name(spot.label, multipliers[spot.label]), colour(colours[spot.label]), few)
        for spot in named
    ]
    return [*lengths, *policies]


def _name(label: str, multiplier: Multiplier) -> str:
    return " ".join(filter(None, [shortened(label, 20), bound(multiplier), f"{multiplier.value.mean:.2f}x"]))


def _markers(axes: Axes, spots: Sequence[Spot]) -> list[Bbox]:
    """Boxes around the markers, where no label should be."""
    return [_around(x, y, 4) for x, y in axes.transData.transform([(spot.cost, spot.accuracy) for spot in spots])]


def _along(axes: Axes, line: Sequence[tuple[float, float]]) -> list[Bbox]:
    """Small boxes along a line, which no label should cross."""
    canvas = axes.transData.transform(line)
    parts = [np.linspace(start, end, 24) for start, end in pairwise(canvas)]
    return [_around(x, y, 1) for part in parts for x, y in part]


def _around(x: float, y: float, reach: float) -> Bbox:
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)

"""The area under a family's Pareto front: how much accuracy it keeps at all costs below the baseline's, as one number.

On one workload, with one seed, x is a training's cost over that of the baseline, and d(x) the difference in accuracy to
the baseline that the family reaches at a cost of at most x. The area is the integral from x = 0 to 1 of
max(0, 1 + d(x) / LOSS), where there is nothing before the cost of the cheapest setting. So it is 0 for a family that
never loses less than LOSS, and would be 1 for the baseline's accuracy at no cost; to be more accurate than the baseline
counts too. The baseline's own point, at x = 1, ends every Pareto front and adds no area of its own.

The means over the seeds decide which settings make the Pareto front of a workload, as in the plots. Decided seed by
seed, it would be made of each seed's lucky settings, and a family with many settings would have more luck. The areas of
the seeds, all under the same settings, then give Student's interval, as everywhere in the report. A bootstrap of three
seeds has ten different samples, and its intervals come out too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from evaluate.analysis.families import Family, families, rival
from evaluate.analysis.pareto import unbeaten
from evaluate.analysis.statistics import Estimate, estimate
from evaluate.trials.records import Results, Trial

LOSS = 0.05
"""The loss of accuracy, a share of 1, from which on a training counts for nothing."""


@dataclass(frozen=True)
class FamilyArea:
    """A family's area, the mean of the workloads' means."""

    family: Family
    area: Estimate
    to_rival: Estimate | None
    """The area less that of the family that all are compared with, by default simply training for fewer steps in the
    better of the ways that were tried, over pairs of a workload and seed; None for that family itself, and where there
    is no pair."""
    workloads: int
    """On how many workloads there is an area."""


def area_under(points: Sequence[tuple[float, float]]) -> float:
    """The area under the settings of a Pareto front, pairs of x and of the difference in accuracy, cheapest first.

    The order is that of their means: where, with one seed, a setting costs no more than the one before it, the later
    one counts from there on.
    """
    total, end = 0.0, 1.0
    for cost, difference in reversed(points):
        total += max(0.0, 1 + difference / LOSS) * max(0.0, end - cost)
        end = min(end, cost)
    return total


def seed_areas(results: Results, family: Family, workload: str) -> dict[int, float]:
    """A family's area on a workload by seed; nothing where it was not run, or a cost was not measured.

    Only seeds with which the baseline finished and all its settings were run. A setting that diverged or failed with
    one of them is not on the Pareto front with any.
    """
    full = results.cell(workload, results.suite.baseline)
    cells = [cell for label in family.members if (cell := results.cell(workload, label))]
    seeds = [seed for seed in full if _finished(full[seed]) and all(seed in cell for cell in cells)]
    if not cells or not seeds:
        return {}
    whole = [cell for cell in cells if all(_finished(cell[seed]) for seed in seeds)]
    places = [[_place(cell[seed], full[seed], results.suite.cost) for seed in seeds] for cell in whole]
    settings = [[place for place in of_seeds if place is not None] for of_seeds in places]
    if any(len(known) < len(seeds) for known in settings):
        return {}
    front = unbeaten(settings, lambda known: fmean(x for x, _ in known), lambda known: fmean(d for _, d in known))
    return {seed: area_under([setting[number] for setting in front]) for number, seed in enumerate(seeds)}


def areas(results: Results) -> list[FamilyArea]:
    """Every family's area, the largest first; families without any are left out."""
    found = families(results)
    known = {family: {name: seed_areas(results, family, name) for name in results.workloads} for family in found}
    own = {family: estimate([list(by_seed.values()) for by_seed in of.values()]) for family, of in known.items()}
    ranked = sorted(((family, area) for family, area in own.items() if area is not None), key=lambda row: -row[1].mean)
    other = rival([family for family, _ in ranked], results.suite.against)
    rows = []
    for family, area in ranked:
        to_rival = estimate(_differences(known[family], known[other])) if other not in (None, family) else None
        rows.append(FamilyArea(family, area, to_rival, sum(map(bool, known[family].values()))))
    return rows


def area_headline(found: Sequence[FamilyArea], other: Family | None, workloads: int) -> str:
    """Which families are shown to do better than the one they are compared with, in one sentence; empty without it.

    workloads: how many the results have. An area, or a rival's, that leaves some of them out may be large for that
    alone, so no such family is named.
    """
    if other is None:
        return ""
    whole = {row.family for row in found if row.workloads == workloads}
    compared = [row for row in found if {row.family, other} <= whole]
    better = [row.family.name for row in compared if row.to_rival is not None and row.to_rival.low > 0]
    if not better:
        return f"No family's area is shown to be larger than that of {other.name}."
    return f"Shown to have a larger area than {other.name}: {'; '.join(better)}."


def _differences(own: dict[str, dict[int, float]], other: dict[str, dict[int, float]]) -> list[list[float]]:
    """For each workload, area less area, for each seed that both have."""
    return [[own[name][seed] - other[name][seed] for seed in own[name] if seed in other[name]] for name in own]


def _finished(trial: Trial) -> bool:
    return trial.status == "finished"


def _place(own: Trial, full: Trial, axis: str) -> tuple[float, float] | None:
    """Cost over the baseline's, and the difference in accuracy."""
    cost, whole = own.cost(axis), full.cost(axis)
    if not cost or not whole or min(cost, whole) < 0 or own.accuracy is None or full.accuracy is None:
        return None
    return cost / whole, own.accuracy - full.accuracy

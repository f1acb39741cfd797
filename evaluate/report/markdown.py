"""The families' curves as a table in Markdown, a line a family, as a README or an appendix takes it.

Areas and costs are by one measure: the one that the results are compared by.
"""

from collections.abc import Mapping

from evaluate.analysis.area import areas
from evaluate.analysis.compute_multiplier import compute_multipliers
from evaluate.analysis.families import Family, rival
from evaluate.analysis.oracle_file import Oracle, shares_of_saving
from evaluate.analysis.statistics import Row, compare, overall
from evaluate.report.table import area, area_difference, multiplier, percent, plain, where_area
from evaluate.trials.records import COST_AXES, Results


def markdown(results: Results, oracles: Mapping[str, Oracle]) -> str:
    """Each family's area, that less the area of the one compared with, and where its settings lie, dearest first.

    oracles: by workload; where there are any, each setting's share of their saving has a column.
    """
    rows = compare(results)
    by_label = {row.policy: row for row in overall(rows)}
    shares = shares_of_saving(rows, oracles, results.suite.margin)
    found = areas(results)
    other = rival([each.family for each in found], results.suite.against)
    points = f"{COST_AXES[results.suite.cost]}: points to `{_escaped(results.suite.baseline)}`"
    header = ["policy", "settings", "area", points]
    if other:
        header.insert(3, f"difference to `{_escaped(other.name)}`")
    multipliers = compute_multipliers(results)
    if multipliers:
        header.append("compute multiplier")
    if shares:
        header.append("share of the oracle's saving")
    lines = [header, ["---"] * len(header)]
    for each in found:
        members = _settings(each.family, by_label)
        settings = str(len(each.family.members))
        own = ", ".join(filter(None, [area(each.area), where_area(each, len(results.workloads))]))
        cells = [_escaped(each.family.name), settings, own, ", ".join(map(_point, members)) or "-"]
        if other:
            cells.insert(3, "-" if each.to_rival is None else area_difference(each.to_rival))
        if multipliers:
            own_multipliers = [multiplier(multipliers.get((row.workload, row.policy))) for row in members]
            cells.append(", ".join(own_multipliers) or "-")
        if shares:
            cells.append(", ".join(percent(shares.get((row.workload, row.policy))) for row in members) or "-")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _settings(family: Family, rows: Mapping[str, Row]) -> list[Row]:
    """A family's rows with a difference and a cost, the dearest first."""
    own = [rows[label] for label in family.members if label in rows]
    known = [(row.speedup.mean, row) for row in own if row.speedup is not None and row.difference is not None]
    return [row for _, row in sorted(known, key=lambda pair: pair[0])]


def _point(row: Row) -> str:
    """Its cost beside the baseline's and its difference in points; of how many trainings, where some are missing."""
    difference = row.difference.mean * 100 if row.difference else 0.0
    cost = percent(1 / row.speedup.mean if row.speedup else None)
    return f"{cost}: {difference:+.1f}" + (f" ({row.finished} of {row.planned})" if row.finished < row.planned else "")


def _escaped(text: str) -> str:
    return plain(text).replace("|", r"\|")

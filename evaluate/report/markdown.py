"""The families' curves as a table in Markdown, a line a family, as a README or an appendix takes it.

Areas and costs are by one measure: the one that the results are compared by.
"""

from collections.abc import Mapping

from tabulate import tabulate

from evaluate.analysis.area import FamilyArea, areas
from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers
from evaluate.analysis.families import Family, rival
from evaluate.analysis.oracle_file import Oracle, shares_of_saving
from evaluate.analysis.statistics import Row, compare, overall
from evaluate.report import format as write
from evaluate.trials.records import COST_AXES, Results


def markdown(results: Results, oracles: Mapping[str, Oracle]) -> str:
    """Each family's settings, most expensive first, with their multipliers, and its area beside the one compared with.

    Args:
        results: What is compared.
        oracles: By workload. Where there are any, each setting's share of their saving has a column.
    """
    rows, found = compare(results), areas(results)
    by_label = {row.policy: row for row in overall(rows)}
    shares = shares_of_saving(results, rows, oracles)
    multipliers = compute_multipliers(results)
    other = rival([each.family for each in found], results.suite.against)
    axis = f"{COST_AXES[results.suite.cost]}: pp to `{_escaped(results.suite.baseline)}`"

    def line(each: FamilyArea) -> dict[str, str]:
        members = _settings(each.family, by_label)
        where = write.area_workloads(each, len(results.workloads))
        cells = {"policy": _escaped(each.family.name), "settings": str(len(each.family.members))}
        cells[axis] = ", ".join(map(_point, members)) or "-"
        if multipliers:
            known = [multipliers.get((row.workload, row.policy)) for row in members]
            cells["compute multiplier"] = "; ".join(map(write.multiplier, known)) or "-"
            if len(results.workloads) > 1:
                cells["lowest of the workloads"] = "; ".join(map(_lowest, known)) or "-"
        cells["area"] = ", ".join(filter(None, [write.area(each.area), where]))
        if other:
            to_rival = "-" if each.to_rival is None else write.area_difference(each.to_rival)
            cells[f"difference to `{_escaped(other.name)}`"] = to_rival
        if shares:
            own = [write.percent(shares.get((row.workload, row.policy))) for row in members]
            cells["share of the oracle's saving"] = ", ".join(own) or "-"
        return cells

    return tabulate([line(each) for each in found], "keys", tablefmt="github", disable_numparse=True)


def _settings(family: Family, rows: Mapping[str, Row]) -> list[Row]:
    """A family's rows with a difference and a cost, the most expensive first."""
    own = [rows[label] for label in family.members if label in rows]
    known = [(row.speedup.mean, row) for row in own if row.speedup is not None and row.difference is not None]
    return [row for _, row in sorted(known, key=lambda pair: pair[0])]


def _point(row: Row) -> str:
    """Its cost beside the baseline's and its difference in pp; of how many trainings, where some are missing."""
    difference = row.difference.mean * 100 if row.difference else 0.0
    cost = write.percent(1 / row.speedup.mean if row.speedup else None)
    return f"{cost}: {difference:+.1f}" + (f" ({row.finished} of {row.planned})" if row.finished < row.planned else "")


def _lowest(found: Multiplier | None) -> str:
    return _escaped(write.lowest(found))


def _escaped(text: str) -> str:
    return write.plain(text).replace("|", r"\|")

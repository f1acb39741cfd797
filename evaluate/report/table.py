"""The comparison as a table in the terminal, with what was left out of it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from tabulate import tabulate

from evaluate.analysis.area import LOSS, FamilyArea, areas
from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers, curve_lengths, full_training_lengths
from evaluate.analysis.families import rival
from evaluate.analysis.oracle_file import Oracle, find_oracles, oracles_beside, shares_of_saving
from evaluate.analysis.statistics import Row, compare
from evaluate.report import findings
from evaluate.report import format as write
from evaluate.report.format import plain, shortened
from evaluate.report.protocol import protocol
from evaluate.trials.records import COST_AXES, Results, read_results

_LABEL_WIDTH = 20
"""Characters of a label, or as many more as it takes to keep all labels distinct."""
_SPEEDUPS = {"train_seconds": "speedup", "cpu_seconds": "CPU speedup", "flops": "by FLOPs"}
"""What the column of cost ratios is called, by the measure of cost."""
_Line = dict[str, str]
"""A line of a table, by column."""


def print_table(folder: Path, oracles: Path | None = None, cost: str | None = None, against: str = "") -> None:
    """Print the results in a folder as a table.

    Args:
        folder: What `python -m evaluate run-suite` wrote.
        oracles: The folder of the files that `python -m evaluate oracle` wrote. Default: `oracle` beside `folder`.
        cost: The measure to compare by, a key of COST_AXES. Default: the suite's own.
        against: The family whose area the others' are compared with. Default: that of training for fewer steps.
    """
    results = read_results(folder, cost, against)
    found, _ = find_oracles(oracles or oracles_beside(folder), results)
    print(table(results, shutil.get_terminal_size((120, 24)).columns, found))


def table(results: Results, width: int, oracles: Mapping[str, Oracle] | None = None) -> str:
    """The rows of each workload under its name, the families' areas, notes, and what was left out.

    Args:
        results: What is compared.
        width: Characters of a line. A wider table is printed in parts.
        oracles: By workload. Without any, the column of their savings is left out.
    """
    rows, found = compare(results), areas(results)
    above = fill(plain(" ".join(findings.headline(results, rows))), min(width, 120))
    lines = [shortened(results.suite.name, width), above, ""]
    lines += _columns(_policy_lines(results, rows, oracles or {}, width), width)
    lines += _columns(_area_lines(results, found), width) if found else []
    notes = [*_notes(results), *(write.oracle_note(oracle, results) for oracle in (oracles or {}).values())]
    said = findings.text(results, min(width, 120))
    # Again at the end, where a long table leaves it in sight.
    return "\n".join([*lines, *map(plain, notes), "", said or above])


def _policy_lines(results: Results, rows: Sequence[Row], oracles: Mapping[str, Oracle], width: int) -> list[_Line]:
    """A line for each row, and one with its name before those of each workload."""
    shares = shares_of_saving(results, rows, oracles)
    multipliers, lengths = compute_multipliers(results), full_training_lengths(results)
    letters = write.distinct_length(results.policies, _LABEL_WIDTH)
    lines: list[_Line] = []
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].workload != row.workload:
            name = "all workloads" if row.workload is None else row.workload
            lines.append({"policy": shortened(name, width)})
        found = multipliers.get((row.workload, row.policy))
        line = {
            "policy": f"  {shortened(row.policy, letters)}",
            "accuracy %": write.accuracy(row),
            "difference": write.difference(row.difference) if row.difference else "-",
            "verdict": row.verdict,
            "FLOPs": write.percent(row.flops_share),
            "compute multiplier": write.ratio(found.value) if found else "-",
            "lowest": "" if row.policy in lengths else write.lowest(found),
            "outside of its curve": write.outside(found) if found else "",
            _SPEEDUPS[results.suite.cost]: write.ratio(row.speedup) if row.speedup else "-",
            "own time": write.percent(row.policy_share, 1),
            "seeds": f"{row.finished}/{row.planned}",
            "div": f"{row.diverged}+{row.failed}!" if row.failed else str(row.diverged),
            "of oracle": write.percent(shares.get((row.workload, row.policy))),
        }
        lines.append(line)
    return _without(lines, _unused(multipliers, shares))


def _unused(
    multipliers: Mapping[tuple[str | None, str], Multiplier], shares: Mapping[tuple[str | None, str], float]
) -> set[str]:
    """The columns that would say nothing."""
    found = multipliers.values()
    used = {
        "compute multiplier": bool(multipliers),
        "lowest": any(len(each.by_workload) > 1 for each in found),
        "outside of its curve": any(each.above or each.below for each in found),
        "of oracle": bool(shares),
    }
    return {column for column, is_used in used.items() if not is_used}


def _without(lines: Sequence[_Line], columns: set[str]) -> list[_Line]:
    return [{column: cell for column, cell in line.items() if column not in columns} for line in lines]


def _area_lines(results: Results, found: Sequence[FamilyArea]) -> list[_Line]:
    """A line for each family, the largest area first. The last column says which areas leave out workloads, if any."""
    other = rival([row.family for row in found], results.suite.against)
    where = [write.area_workloads(row, len(results.workloads)) for row in found]
    lines: list[_Line] = [{"family": "area under the Pareto front"}]
    for row, on in zip(found, where, strict=True):
        line = {
            "family": f"  {shortened(row.family.name, _LABEL_WIDTH)}",
            "settings": str(len(row.family.members)),
            "area": write.area(row.area),
        }
        if other:
            difference = write.area_difference(row.to_rival) if row.to_rival else "-"
            line[f"to {shortened(other.name, _LABEL_WIDTH)}"] = difference
        lines.append(line | ({"workloads": on or "all"} if any(where) else {}))
    return lines


def _columns(lines: Sequence[_Line], width: int) -> list[str]:
    """The lines under their columns' names: in one table, or in several below each other where it is too wide."""
    first, *names = max(lines, key=len)
    whole: list[str] = []
    while names:
        fitting = next(
            count for count in range(len(names), 0, -1) if count == 1 or _width(lines, names[:count]) <= width
        )
        whole += [*_rendered(lines, [first, *names[:fitting]]), ""]
        names = names[fitting:]
    return whole


def _width(lines: Sequence[_Line], names: Sequence[str]) -> int:
    return max(map(len, _rendered(lines, [next(iter(lines[0])), *names])))


def _rendered(lines: Sequence[_Line], names: Sequence[str]) -> list[str]:
    cells = [[line.get(name, "") for name in names] for line in lines]
    text = tabulate(cells, names, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
    return [line.rstrip() for line in text.splitlines()]


def _notes(results: Results) -> list[str]:
    """What the columns mean, and what was left out."""
    suite, lengths = results.suite, curve_lengths(results)
    lines = [
        f"difference: percentage points to {suite.baseline}, mean of paired seeds [95 % interval]; "
        f"margin {suite.margin * 100:g}",
        f"{_SPEEDUPS[suite.cost]}: ratio of {COST_AXES[suite.cost]}, geometric mean [95 % interval]; "
        "own time: the policy's share of the training time",
    ]
    if compute_multipliers(results):
        lines.append(
            f"compute multiplier: FLOPs with which full training of the best length ({', '.join(lengths)}) is as "
            "accurate as the policy, over the policy's [95 % interval]; above 1 beats fewer steps; lowest: of the "
            "workloads'; above the curve: more accurate than every length; below it: less accurate than the shortest"
        )
        lines += filter(None, [write.curve_gaps(results)])
    if areas(results):
        lines.append(
            f"area: the mean, over all costs up to that of {suite.baseline}, of the accuracy that a policy's settings "
            f"keep at that cost: 1 for all of it, 0 for {LOSS * 100:g} percentage points less"
        )
    how = protocol(results)
    lines += [how.sentence] if how.warning else []
    lines += _lost(results)
    if missing := results.missing():
        lines.append(f"not run: {len(missing)} of the suite's trials; the same run-suite command goes on with them")
    return lines + [f"left out: {fault}" for fault in results.faults]


def _lost(results: Results) -> list[str]:
    """Trials that diverged or failed and why, those that differ in their seed alone in one line."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for status in ("diverged", "failed"):
        for trial in results.trials:
            if trial.status == status:
                why = f": {trial.error.strip().splitlines()[-1]}" if trial.error.strip() else ""
                seeds.setdefault((status, f"{trial.workload}, {trial.policy}", why), []).append(str(trial.seed))
    named = ((*key, f"seed{'s' if len(own) > 1 else ''} {', '.join(own)}") for key, own in seeds.items())
    return [f"{status}: {what}, {which}{why}" for status, what, why, which in named]

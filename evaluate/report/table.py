"""The comparison as a table in the terminal, and how its figures are written, there and on the page."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluate.analysis.area import LOSS, FamilyArea, areas
from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers, full_training_lengths
from evaluate.analysis.families import rival
from evaluate.analysis.oracle_file import Oracle, find_oracles, oracles_beside, shares_of_saving
from evaluate.analysis.statistics import Estimate, Row, compare, headline
from evaluate.report.protocol import protocol
from evaluate.trials.records import COST_AXES, Results, read_results

_LABEL_WIDTH = 20
"""Characters of a label in the terminal, or as many more as it takes to tell all labels apart."""
_WIDEST_LABEL = 60
_SPEEDUPS = {"train_seconds": "speedup", "cpu_seconds": "CPU speedup", "flops": "by FLOPs"}
"""What the column of cost ratios is called, by the measure of cost."""
_GAP = "  "
_Blocks = list[tuple[str, list[tuple[str, ...]]]]


def print_table(folder: Path, oracles: Path | None = None, cost: str | None = None, against: str = "") -> None:
    """Print the results in `folder` as a table, with what was left out of it.

    oracles: the folder of the files that `python -m evaluate oracle` wrote; by default `oracle` beside `folder`.
    cost: the measure to compare by, a key of COST_AXES; the suite's own by default.
    against: the family whose area the others' are compared with; that of training for fewer steps by default.
    """
    results = read_results(folder, cost, against)
    found, _ = find_oracles(oracles or oracles_beside(folder), results)
    text = table(results, shutil.get_terminal_size((120, 24)).columns, found)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def table(results: Results, width: int, oracles: Mapping[str, Oracle] | None = None) -> str:
    """The rows of each workload under its name, the families' areas, the legend, and what was left out.

    Lines of rows are of at most `width`. oracles: by workload; their column is left out where there are none.
    """
    rows = compare(results)
    shares = shares_of_saving(rows, oracles or {}, results.suite.margin)
    multipliers = compute_multipliers(results)
    speedup = _SPEEDUPS[results.suite.cost]
    factor = ["compute multiplier"] if multipliers else []
    header = ["policy", "accuracy %", "difference", "verdict", speedup, "FLOPs", *factor, "own time", "seeds", "div"]
    header += ["of oracle"] if shares else []
    letters = distinct_length(results.policies, _LABEL_WIDTH)
    blocks: _Blocks = []
    for row in rows:
        title = shortened(row.workload, width) if row.workload is not None else "all workloads"
        if not blocks or blocks[-1][0] != title:
            blocks.append((title, []))
        found_multiplier = multipliers.get((row.workload, row.policy))
        factor = [multiplier(found_multiplier)] if multipliers else []
        share = [percent(shares.get((row.workload, row.policy)))] if shares else []
        blocks[-1][1].append((*_cells(row, letters, factor), *share))
    lines = [shortened(results.suite.name, width), ""]
    lines += _columns(header, blocks, width)
    found = areas(results)
    lines += _area_lines(results, found, width) if found else []
    more = [_multiplier_note(results)] if multipliers else []
    more += [_area_note(results)] if found else []
    more += [oracle_note(oracle) for oracle in (oracles or {}).values()]
    return "\n".join([*lines, *notes(results), *map(plain, more), "", plain(headline(results, rows))])


def notes(results: Results) -> list[str]:
    """What the columns mean, and what was left out: plain text, for the terminal."""
    suite = results.suite
    lines = [
        f"difference: percentage points to {plain(suite.baseline)}, mean of paired seeds [95 % interval]; "
        f"margin {suite.margin * 100:g}",
        f"{_SPEEDUPS[suite.cost]}: ratio of {COST_AXES[suite.cost]}, geometric mean [95 % interval]; "
        "own time: the policy's share of the training time",
    ]
    told = protocol(results)
    lines += [told.sentence] if told.warning else []
    lines += _lost(results)
    if missing := results.missing():
        lines.append(f"not run: {len(missing)} of the suite's trials; the same run-suite command goes on with them")
    return lines + [f"left out: {plain(fault)}" for fault in results.faults]


def _lost(results: Results) -> list[str]:
    """Trials that diverged or failed and why, those that differ in their seed alone in one line."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for status in ("diverged", "failed"):
        for trial in results.trials:
            if trial.status == status:
                why = f": {plain(trial.error.strip().splitlines()[-1])}" if trial.error.strip() else ""
                what = plain(f"{trial.workload}, {trial.policy}")
                seeds.setdefault((status, what, why), []).append(str(trial.seed))
    named = ((*key, f"seed{'s' if len(own) > 1 else ''} {', '.join(own)}") for key, own in seeds.items())
    return [f"{status}: {what}, {which}{why}" for status, what, why, which in named]


def oracle_note(oracle: Oracle) -> str:
    """What an oracle is, for those who read of a share of its saving."""
    return (
        f"Oracle of {oracle.workload}: the best of {oracle.tried} freezing schedules, found on the test set: an upper "
        "limit of what freezing could save, part of it luck"
    )


def points(difference: Estimate) -> str:
    """An accuracy difference in percentage points, with its interval."""
    return f"{difference.mean * 100:+.2f}" + _interval(difference, 100, 2, "+")


def times(ratio: Estimate) -> str:
    """A ratio with its interval."""
    return f"{ratio.mean:.2f}x" + _interval(ratio, 1, 2, "")


def multiplier(value: Multiplier | None) -> str:
    """A compute multiplier with its interval, and whether it is a bound; "-" for None."""
    if value is None:
        return "-"
    bound = {(True, True): "~ ", (True, False): ">= ", (False, True): "<= "}
    return bound.get((value.at_least, value.at_most), "") + times(value.value)


def area(value: Estimate) -> str:
    """An area under a front with its interval."""
    return f"{value.mean:.3f}" + _interval(value, 1, 3, "")


def where_area(row: FamilyArea, workloads: int) -> str:
    """On how many of the workloads there is an area; empty for all of them."""
    return "" if row.workloads >= workloads else f"on {row.workloads} of {workloads} workloads"


def area_difference(value: Estimate) -> str:
    """An area less another with its interval."""
    return f"{value.mean:+.3f}" + _interval(value, 1, 3, "+")


def accuracy(row: Row) -> str:
    """Mean accuracy in percent, and its standard deviation over the seeds."""
    if row.accuracy is None:
        return "-"
    deviation = "" if row.accuracy_deviation is None else f" ±{row.accuracy_deviation * 100:.2f}"
    return f"{row.accuracy * 100:.2f}{deviation}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 in percent; "-" for None."""
    return "-" if share is None else f"{share * 100:.{digits}f} %"


def plain(text: str) -> str:
    """`text` with everything that could steer a terminal made visible."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(text: str, length: int) -> str:
    """`text` made plain and cut in the middle to `length` characters: labels differ at both ends."""
    text = plain(text)
    if len(text) <= length:
        return text
    head = length * 3 // 5
    return f"{text[:head]}…{text[head + 1 - length :]}"


def distinct_length(labels: Sequence[str], least: int) -> int:
    """The length, from `least` on, from which `shortened` leaves different labels different."""
    lengths = range(least, _WIDEST_LABEL)
    return next(
        (length for length in lengths if len({shortened(label, length) for label in labels}) == len(labels)),
        _WIDEST_LABEL,
    )


def _interval(value: Estimate, scale: float, digits: int, sign: str) -> str:
    if not value.bounded:
        return " [?]"
    return f" [{value.low * scale:{sign}.{digits}f}, {value.high * scale:{sign}.{digits}f}]"


def _cells(row: Row, letters: int, factor: Sequence[str]) -> tuple[str, ...]:
    return (
        "  " + shortened(row.policy, letters),
        accuracy(row),
        points(row.difference) if row.difference else "-",
        row.verdict,
        times(row.speedup) if row.speedup else "-",
        percent(row.flops_share),
        *factor,
        percent(row.policy_share, 1),
        f"{row.finished}/{row.planned}",
        str(row.diverged) if not row.failed else f"{row.diverged}+{row.failed}!",
    )


def _area_lines(results: Results, found: Sequence[FamilyArea], width: int) -> list[str]:
    """A line for each family, the largest area first; the last column says which areas leave out workloads, if any."""
    other = rival([row.family for row in found], results.suite.against)
    where = [where_area(row, len(results.workloads)) for row in found]
    header = ["family", "settings", "area", *([f"to {shortened(other.name, _LABEL_WIDTH)}"] if other else [])]
    header += ["workloads"] if any(where) else []
    cells: list[tuple[str, ...]] = []
    for row, place in zip(found, where, strict=True):
        to_rival = [area_difference(row.to_rival) if row.to_rival else "-"] if other else []
        name = "  " + shortened(row.family.name, _LABEL_WIDTH)
        last = [place or "all"] if any(where) else []
        cells.append((name, str(len(row.family.members)), area(row.area), *to_rival, *last))
    return _columns(header, [("area under the front", cells)], width)


def _multiplier_note(results: Results) -> str:
    lengths = ", ".join(plain(label) for label in full_training_lengths(results))
    return (
        f"compute multiplier: FLOPs with which full training of the best length ({lengths}) is as accurate as the "
        "policy, over the policy's [95 % interval]; above 1 beats fewer steps; on a workload at least it is >= more "
        "accurate than all lengths, <= less accurate than the shortest, ~ both"
    )


def _area_note(results: Results) -> str:
    return (
        f"area: the mean, over all costs up to that of {results.suite.baseline}, of the accuracy that a policy's "
        f"settings keep at that cost: 1 for all of it, 0 for {LOSS * 100:g} points less"
    )


def _columns(header: Sequence[str], blocks: _Blocks, width: int) -> list[str]:
    """Titled blocks of cells under one header; what is too wide comes as several tables below each other."""
    lines = []
    for part in _columns_that_fit(header, [cells for _, block in blocks for cells in block], width):
        widths = [max(len(header[i]), *(len(cells[i]) for _, block in blocks for cells in block)) for i in part]
        lines.append(_line([header[i] for i in part], widths))
        for title, block in blocks:
            lines.append(title)
            lines += [_line([cells[i] for i in part], widths) for cells in block]
        lines.append("")
    return lines


def _columns_that_fit(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Column numbers for one table, or for several below each other, each with the first column, if one is too wide."""
    widths = [max(len(header[i]), *(len(cells[i]) for cells in rows)) for i in range(len(header))]
    parts = [[0]]
    for i in range(1, len(header)):
        taken = sum(widths[j] + len(_GAP) for j in parts[-1])
        if taken + widths[i] > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return _GAP.join([first, *rest]).rstrip()

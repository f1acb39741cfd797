"""The comparison as a table in the terminal, and how its figures are written, there and on the page."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluate.results import COST_AXES, Results, read_results
from evaluate.statistics import Estimate, Row, compare, headline

_LABEL_WIDTH = 20
_GAP = "  "


def print_table(folder: Path) -> None:
    """Print the results in `folder` as a table, with what was left out of it."""
    text = table(read_results(folder), shutil.get_terminal_size((120, 24)).columns)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def table(results: Results, width: int) -> str:
    """The rows of each workload under its name, the legend, and what was left out, in lines of at most `width`."""
    rows = compare(results)
    speedup = "CPU speedup" if results.suite.cost == "cpu_seconds" else "speedup"
    header = ("policy", "accuracy %", "difference", "verdict", speedup, "FLOPs", "own time", "seeds", "div")
    blocks: list[tuple[str, list[tuple[str, ...]]]] = []
    for row in rows:
        title = shortened(row.workload, width) if row.workload is not None else "all workloads"
        if not blocks or blocks[-1][0] != title:
            blocks.append((title, []))
        blocks[-1][1].append(_cells(row))
    lines = [shortened(results.suite.name, width), ""]
    for part in _columns_that_fit(header, [cells for _, block in blocks for cells in block], width):
        widths = [max(len(header[i]), *(len(cells[i]) for _, block in blocks for cells in block)) for i in part]
        lines.append(_line([header[i] for i in part], widths))
        for title, block in blocks:
            lines.append(title)
            lines += [_line([cells[i] for i in part], widths) for cells in block]
        lines.append("")
    return "\n".join([*lines, *notes(results), "", plain(headline(results, rows))])


def notes(results: Results) -> list[str]:
    """What the columns mean, and what was left out: plain text, for the terminal."""
    suite = results.suite
    lines = [
        f"difference: percentage points to {plain(suite.baseline)}, mean of paired seeds [95 % interval]; "
        f"margin {suite.margin * 100:g}",
        f"speedup: ratio of {COST_AXES[suite.cost]}, geometric mean [95 % interval]; "
        "own time: the policy's share of the training time",
    ]
    for status in ("diverged", "failed"):
        trials = [trial for trial in results.trials if trial.status == status]
        for trial in trials:
            why = f": {plain(trial.error.strip().splitlines()[-1])}" if trial.error.strip() else ""
            lines.append(f"{status}: {plain(f'{trial.workload}, {trial.policy}, seed {trial.seed}')}{why}")
    if missing := results.missing():
        lines.append(f"not run: {len(missing)} of the suite's trials; the same run-suite command goes on with them")
    return lines + [f"left out: {plain(fault)}" for fault in results.faults]


def points(difference: Estimate) -> str:
    """An accuracy difference in percentage points, with its interval."""
    return f"{difference.mean * 100:+.2f}" + _interval(difference, 100, 2, "+")


def times(ratio: Estimate) -> str:
    """A ratio with its interval."""
    return f"{ratio.mean:.2f}x" + _interval(ratio, 1, 2, "")


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


def _interval(value: Estimate, scale: float, digits: int, sign: str) -> str:
    if not value.bounded:
        return " [?]"
    return f" [{value.low * scale:{sign}.{digits}f}, {value.high * scale:{sign}.{digits}f}]"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        "  " + shortened(row.policy, _LABEL_WIDTH),
        accuracy(row),
        points(row.difference) if row.difference else "-",
        row.verdict,
        times(row.speedup) if row.speedup else "-",
        percent(row.flops_share),
        percent(row.policy_share, 1),
        f"{row.finished}/{row.planned}",
        str(row.diverged) if not row.failed else f"{row.diverged}+{row.failed}!",
    )


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

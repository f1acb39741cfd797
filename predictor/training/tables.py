"""Figures as columns of text, out of content that may hold anything: n/a for what is no figure, no control codes."""

import math
from collections.abc import Sequence
from typing import Any


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be, the first to the left; a title may have several lines."""
    words = [title.split("\n") for title in titles]
    height = max(len(parts) for parts in words)
    heads = [[""] * (height - len(parts)) + parts for parts in words]
    grid = [[head[line] for head in heads] for line in range(height)] + [list(row) for row in rows]
    widths = [max(len(row[column]) for row in grid) for column in range(len(titles))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in grid)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def at(content: Any, *path: str) -> Any:
    """What lies at a path of keys; None where nothing does."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def number(value: Any) -> float | None:
    """A figure that can be shown; None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if usable and math.isfinite(value) else None


def figure(value: Any) -> str:
    """Three places behind the point."""
    found = number(value)
    return "n/a" if found is None else f"{found:.3f}"


def percent(value: Any) -> str:
    """A share as a percentage."""
    found = number(value)
    return "n/a" if found is None else f"{100 * found:.1f} %"


def text(value: Any) -> str:
    """A count or a name on one line."""
    if value is None:
        return "n/a"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 1e15 else "n/a"
    return "".join(letter for letter in str(value)[:200] if letter.isprintable())

"""Turns matplotlib figures into inline SVG that takes its colours and its font from the page around it.

A figure is drawn with placeholder colours; in the SVG they become CSS variables, so that the page's light and dark
styles reach into the figures. Nothing that a figure writes becomes markup: matplotlib escapes text. Formulas, which it
would otherwise read in a policy's label ("$...$"), are switched off.
"""

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

INK, FAINT, BAND, PAPER = "#ab0001", "#ab0002", "#ab0003", "#ab0004"
"""Text and axes; grids; shaded areas; the page's background."""
_SERIES = tuple(f"#ab001{number}" for number in range(7))
_VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", BAND: "var(--band)", PAPER: "var(--paper)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(_SERIES)
}
# As many shapes as make, with six colours, 42 different pairs.
_MARKERS = ("o", "s", "^", "D", "v", "P", "p")

WIDTH = 4.8
"""Inches; at 72 to the inch about as wide as a phone, so that the text is as large there as it is drawn."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # else its index is looked for, which takes a fifth of the time that many panels take
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.unicode_minus": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    """What is seen in it, in a sentence."""
    svg: str
    note: str = ""
    """How to read it."""


def colour(index: int) -> str:
    """The placeholder of a policy's colour; index 0 is the baseline."""
    return _SERIES[0] if index == 0 else _SERIES[1 + (index - 1) % (len(_SERIES) - 1)]


def marker(index: int) -> str:
    """A policy's marker; with the colour it is different for each of 42 policies besides the baseline."""
    return "X" if index == 0 else _MARKERS[(index - 1) % len(_MARKERS)]


def drawn(height: float, draw: Callable[[Figure], Any], title: str, width: float = WIDTH) -> str:
    """The SVG of a new figure of `width` x `height` inches that `draw` fills.

    title: what a screen reader says. It is different for each figure of a page, because the identifiers inside the
        SVG are made from it.
    """
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        # A label in a script that matplotlib's font lacks is only measured with it; the browser has other fonts.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=72)
        draw(figure)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(text.getvalue(), title)


def standalone(svg: str) -> str:
    """An SVG of `drawn` as a standalone file in the page's colours, light or dark by the reader's system."""
    variables = re.findall(r":root \{[^}]*\}", (Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    light, dark = ("svg" + each.removeprefix(":root") for each in variables)
    font = (
        'svg { background: var(--paper); color: var(--ink); font-family: system-ui, "Segoe UI", Helvetica, sans-serif }'
    )
    style = f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }} {font}</style>"
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    opening, rest = svg.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{style}{paper}{rest}\n'


def swatch(index: int) -> str:
    """A policy's marker in its colour, for legends in HTML."""
    style = MarkerStyle(marker(index))
    outline = np.array(style.get_path().transformed(style.get_transform()).to_polygons()[0])
    points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in outline)
    fill = f'style="fill: {_VARIABLES[colour(index)]}"'
    return (
        f'<svg class="swatch" viewBox="-.75 -.75 1.5 1.5" aria-hidden="true"><polygon points="{points}" {fill}/></svg>'
    )


def _inline(text: str, title: str) -> str:
    """Only the svg element, scalable, with CSS variables for colours, and nothing that reaches out of it."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _tidied(tag[0]), text)
    text = re.sub(r">\s+<", "><", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{html.escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def _tidied(tag: str) -> str:
    """A tag with variables for placeholder colours, two decimals, and the page's font."""
    tag = " ".join(tag.split())
    tag = re.sub(r"#ab00[01][0-9]", lambda match: _VARIABLES.get(match[0], match[0]), tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    return re.sub(r' id="[^"]*"', "", tag) if tag.startswith("<g ") else tag

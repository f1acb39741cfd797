"""Small multiples: how panels of the same axes share a figure."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Inches around the panels and between them. A layout found by drawing twice would double the time that a report takes.
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN, _ABOVE = 0.68, 0.14, 0.24, 0.5, 0.14, 0.3
_PANEL_HEIGHT = 1.45
_LETTERS = 44


def columns_for(panels: int) -> int:
    """How many panels stand beside each other."""
    return 1 if panels <= 1 else 2 if panels <= 4 else 3


def letters_for(columns: int) -> int:
    """How long a panel's title may be."""
    return _LETTERS // columns


def height_for(panels: int, columns: int) -> float:
    """Inches of a figure of that many panels."""
    return _BOTTOM + _PANEL_HEIGHT * _lines(panels, columns)


def panel_grid(figure: Figure, panels: int, columns: int) -> Any:
    """The axes of a figure, (lines, columns), all with the same scales."""
    return figure.subplots(_lines(panels, columns), columns, sharex=True, sharey=True, squeeze=False)


def arrange(figure: Figure, grid: Any, used: int, x_label: str, y_label: str, *, whole_y: bool = False) -> None:
    """Common labels, no empty axes, and numbers under the lowest panel of each column."""
    lines, columns = grid.shape
    width, height = figure.get_size_inches()
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - _TOP / height,
        bottom=_BOTTOM / height,
        wspace=_BETWEEN * columns / (inner_width - _BETWEEN * (columns - 1)),
        hspace=_ABOVE * lines / (inner_height - _ABOVE * (lines - 1)),
    )
    figure.supxlabel(x_label, x=(_LEFT + inner_width / 2) / width, y=0.04 / height, fontsize="medium")
    figure.supylabel(y_label, x=0.012, y=(_BOTTOM + inner_height / 2) / height, fontsize="medium")
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < used)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=whole_y))
        axes.tick_params(labelbottom=number in range(used - columns, used))


def _lines(panels: int, columns: int) -> int:
    return -(-panels // columns)

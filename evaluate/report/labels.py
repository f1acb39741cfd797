"""Names beside the points of a figure, each where there is room for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# Where a label may stand beside its point: offset in points, horizontal and vertical alignment.
_SIDES = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (6, 3, "left", "bottom"),
    (6, -3, "left", "top"),
    (-6, 3, "right", "bottom"),
    (-6, -3, "right", "top"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
)
_ABOVE = 4.0
"""Points that a label may rise above the axes."""


@dataclass(frozen=True)
class Label:
    """A text that belongs to the point (x, y) of the data."""

    x: float
    y: float
    text: str
    colour: str
    always: bool = False
    """Whether it is written where it covers the least, rather than left out, where there is no room."""


def label_points(axes: Axes, labels: Sequence[Label], taken: Sequence[Bbox]) -> None:
    """Write each label beside its point.

    Args:
        axes: Of a figure that was drawn without rendering, so that its limits and layout are settled.
        labels: The most important first.
        taken: Boxes on the canvas that labels should not cover.
    """
    taken = list(taken)
    for label in labels:
        texts = [_written(axes, label, side) for side in _SIDES]
        boxes = [text.get_window_extent() for text in texts]
        covered = [box.count_overlaps(taken) if _inside(axes, box) else math.inf for box in boxes]
        best = covered.index(min(covered))
        kept = covered[best] == 0 or (label.always and covered[best] < math.inf)
        for index, text in enumerate(texts):
            if index != best or not kept:
                text.remove()
        taken += [boxes[best]] if kept else []


def _written(axes: Axes, label: Label, side: tuple[float, float, str, str]) -> Annotation:
    x, y, horizontal, vertical = side
    return axes.annotate(
        label.text,
        (label.x, label.y),
        (x, y),
        textcoords="offset points",
        horizontalalignment=horizontal,
        verticalalignment=vertical,
        color=label.colour,
        in_layout=False,
    )


def _inside(axes: Axes, box: Bbox) -> bool:
    beside = not (axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1))
    return not beside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 + _ABOVE

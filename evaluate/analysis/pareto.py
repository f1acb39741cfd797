"""The Pareto front of anything that has a cost and a worth."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
ROUNDING = 1e-12
"""Worths that differ by less are equal. Accuracies are shares of a thousand test samples or so."""


def unbeaten(items: Iterable[T], cost: Callable[[T], float], worth: Callable[[T], float]) -> list[T]:
    """Those that no other matches in cost and worth and beats in one of them, cheapest first.

    Of several that are equal in both, the first. Worths that differ by less than ROUNDING are equal: floating-point
    means of equal sums differ in their last bit.
    """
    front: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -worth(item))):
        if not front or worth(item) > worth(front[-1]) + ROUNDING:
            front.append(item)
    return front

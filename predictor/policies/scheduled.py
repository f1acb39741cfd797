"""A prefix that changes at times fixed beforehand: any schedule that can be written down."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View

_EXAMPLE = "give it as [[progress, share of the layers], ...], such as [[0.5, 0.25], [0.75, 0.5]]"


class SchedulePolicy(FreezePolicy):
    """Freezes a prefix of a given size from each of several given times on.

    Paper: none; what a search over schedules tries (`python -m evaluate oracle`).

    Rule: with t the progress, take the share of the last pair whose progress is at most t, 0 before the first pair. The
    first round(share * L) of L layers are frozen.

    Signal: time.

    Differs: nothing.

    Cost: none.

    Args:
        fronts: pairs of a progress, from 0 to 1, and of the share of the layers that are frozen from then on, from 0 to
            1. The progress rises from pair to pair. Where a share falls, layers are unfrozen. Without any pair nothing
            freezes.
    """

    def __init__(self, fronts: Sequence[Sequence[float]] = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))) -> None:
        self.fronts = tuple(_pair(pair, fronts) for pair in fronts)
        times = [progress for progress, _ in self.fronts]
        if times != sorted(set(times)):
            raise UsageError(f"fronts={fronts}: the progress must rise from pair to pair")
        self.unfreezes = any(later < share for (_, share), (_, later) in pairwise(self.fronts))

    def decide(self, view: View) -> frozenset[int]:
        """The prefix of the last pair whose time has come."""
        share = next((share for progress, share in reversed(self.fronts) if view.progress >= progress), 0.0)
        return frozenset(range(round(share * len(view.layers))))


def _pair(pair: Any, fronts: Any) -> tuple[float, float]:
    try:
        progress, share = (float(value) for value in pair)
    except (TypeError, ValueError) as error:
        raise UsageError(f"fronts={fronts}: {_EXAMPLE}") from error
    if not (0 <= progress <= 1 and 0 <= share <= 1):
        raise UsageError(f"fronts={fronts}: a progress and a share lie from 0 to 1; {_EXAMPLE}")
    return progress, share

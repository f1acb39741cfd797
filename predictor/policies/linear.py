"""A prefix that grows evenly with time."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class LinearPolicy(FreezePolicy):
    """Freezes nothing until `start`, then a prefix that grows linearly until `end`.

    Paper: none; MosaicML Composer's layer freezing.

    Rule: with t the progress in (0, 1], share(t) = level * (t - start) / (end - start) for start < t < end, then level.
    The first floor(share * L) of L layers are frozen.

    Signal: time.

    Differs: Composer counts modules that hold parameters, with the head. Here the layers are those of `layers_of`,
    without the head. Composer's prefix grows until the training ends.

    Cost: none.

    Args:
        start: the progress at which freezing starts, in [0, 1).
        level: the share of the layers that are frozen in the end.
        end: the progress from which that share is frozen.
    """

    def __init__(self, start: float = 0.5, level: float = 1.0, end: float = 1.0) -> None:
        if not 0 <= start < 1:
            raise UsageError(f"start={start}: give a progress from 0 to below 1")
        if not 0 <= level <= 1:
            raise UsageError(f"level={level}: give a share of the layers, from 0 to 1")
        if not start < end <= 1:
            raise UsageError(f"end={end}: give a progress after start={start}, up to 1")
        self.start = start
        self.level = level
        self.end = end

    def decide(self, view: View) -> frozenset[int]:
        """The prefix for this progress."""
        share = min(self.level * (view.progress - self.start) / (self.end - self.start), self.level)
        return frozenset(range(int(max(share, 0.0) * len(view.layers))))

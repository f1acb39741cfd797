"""What a layer's learning rate has done so far: its peak, its lowest since, and whether it has risen again."""

from dataclasses import dataclass

from predictor.model.features import log_lr

_RISE = 2
"""A rate has risen again when it is this many times its lowest since the peak, which was as far below the peak."""


@dataclass
class RateSoFar:
    """A learning rate, snapshot by snapshot."""

    now: float = 0.0
    peak: float = 0.0
    """The highest so far."""
    lowest: float = 0.0
    """The lowest since the peak, or since it last rose again."""
    rose: bool = False
    """Whether it is rising again with the newest snapshot. A warm-up is a first rise."""
    has_risen: bool = False
    """Whether it ever has."""
    snapshots: int = 0

    def note(self, lr: float) -> None:
        """Take the rate of a snapshot."""
        self.now = lr
        if self.snapshots == 1 and lr * _RISE < self.peak:
            # Some loops set the rate in each step. Then the optimizer's own at the start was never used.
            self.peak = self.lowest = lr
        self.rose = self.lowest * _RISE < min(lr, self.peak)
        self.has_risen |= self.rose
        if lr >= self.peak:
            self.peak = lr
        self.lowest = lr if self.rose or lr == self.peak else min(self.lowest, lr)
        self.snapshots += 1

    @property
    def log(self) -> float:
        """The feature log_lr."""
        return log_lr(self.now, self.peak)

    def may_rise_again(self, progress: float) -> bool:
        """Whether it is low for a schedule that has risen before: below its peak times the time that is left."""
        return self.has_risen and self.now < self.peak * (1 - progress)

"""What a predictor looks at, and the size of its network. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from predictor.errors import UsageError
from predictor.shared.flags import option

CLOCK = ("progress", "depth", "log_lr")
"""Features that are known without looking at the network."""
GAINS = ("log_distance", "front_distance", "log_gain", "log_front_gain", "log_front_share", "log_gradient")
"""Features of how far a layer has come, and of what its training would still gain."""
FEATURES = (*CLOCK, *GAINS)
"""The features of a layer at one snapshot: see `predictor.model.features.snapshot_features`."""
MOTION = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", "evenness")
"""The features of a layer's motion between two snapshots: see `predictor.model.features.motion`."""


@dataclass(frozen=True)
class PredictorConfig:
    """What a predictor sees, and the widths of its network.

    Raises UsageError for a window of fewer than three snapshots, and for widths and a dropout that cannot be.
    """

    inputs: Literal["gain", "motion", "raw"] = option(
        "gain",
        "What it sees of a snapshot: scale-free statistics of how the weights moved, with all features (gain) or those "
        "of the clock alone (motion); or the raw weights, as in the paper",
    )
    window: int = option(10, "Snapshots in a window (W)")
    weights: int = option(256, "Sampled weights it looks at (K); at most as many as were recorded")
    hidden: int = option(64, "Width of the hidden layers of the K, Q and V networks")
    key: int = option(32, "Width of keys, queries and values")
    dropout: float = option(0.1, "Dropout in the K, Q and V networks")

    def __post_init__(self) -> None:
        if self.window < 3:
            raise UsageError(f"window={self.window}: two motions need at least 3 snapshots")
        if min(self.weights, self.hidden, self.key) < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"{self}: weights, hidden and key count from 1, dropout lies in [0, 1)")

    @property
    def features(self) -> tuple[str, ...]:
        """The features in a token: the first so many of FEATURES."""
        return {"gain": FEATURES, "motion": CLOCK, "raw": ()}[self.inputs]

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.weights if self.inputs == "raw" else len(MOTION) + len(self.features)

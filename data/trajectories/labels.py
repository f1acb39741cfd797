"""When a layer may be frozen. Labels are computed from the stored similarity when read, so the rule can be tuned."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from predictor.errors import UsageError

if TYPE_CHECKING:  # the command line takes its defaults from here, and must not wait for NumPy
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class LabelRule:
    """A layer may be frozen once its output is similar to the final network's and stays so to the end."""

    threshold: float = 0.98
    """CKA to the final network that a layer must reach before it may be frozen."""
    dip: float = 0.0
    """How far the similarity may fall below the threshold later."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold}: give a similarity above 0 and up to 1")
        if not 0 <= self.dip < self.threshold:
            raise UsageError(f"dip={self.dip}: give a number from 0 to below the threshold of {self.threshold}")

    def labels(self, similarity_TL: "npt.NDArray[np.float32]") -> "npt.NDArray[np.bool_]":
        """labels_TL: whether each layer may be frozen at each snapshot.

        It may not where the similarity is NaN. A NaN has no effect on the snapshots before it.
        """
        import numpy as np

        known_TL = np.where(np.isnan(similarity_TL), np.inf, similarity_TL)
        lowest_TL = np.minimum.accumulate(known_TL[::-1])[::-1]  # from here to the end
        # NumPy compares in the array's precision: a similarity stored as 0.98 reaches 0.98.
        labels_TL: npt.NDArray[np.bool_] = (similarity_TL >= self.threshold) & (lowest_TL >= self.threshold - self.dip)
        return labels_TL

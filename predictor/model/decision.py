"""How certain the predictor has to be before a prefix freezes: the less it saves, the more certain."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def saved_by(step_F: npt.ArrayLike) -> Floats:
    """saved_L: the share of a step's FLOPs that freezing the prefix up to each layer saves, from 0 to 1.

    The whole network saves the whole step, because a training may end when all its layers are frozen.

    Args:
        step_F: FLOPs of a step with a frozen prefix of 0, 1, ... L layers, as shares of a full step's.
    """
    saved_L: Floats = 1 - np.asarray(step_F, dtype=np.float64)[1:]
    saved_L[-1] = 1
    return saved_L


def largest_prefix(probability_L: npt.ArrayLike, saved_L: Floats, threshold: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How many layers are in the largest prefix that may freeze at a threshold. One number for each threshold.

    A prefix has the lowest probability of its layers. Its doubt is 1 minus that. A prefix may freeze if its doubt is at
    most the threshold's doubt times what the prefix saves. So the accuracy at risk is in one proportion to the FLOPs
    saved, wherever layers freeze. A first layer alone saves little and has to be almost certain.

    Args:
        probability_L: the predicted probability of each layer that it may be frozen.
        saved_L: from `saved_by`.
        threshold: one or several, as probabilities.
    """
    doubt_L = 1 - np.minimum.accumulate(np.asarray(probability_L, dtype=np.float64))
    allowed_HL = (1 - np.asarray(threshold, dtype=np.float64))[..., None] * saved_L
    sizes_L = np.arange(1, len(saved_L) + 1)
    prefix: npt.NDArray[np.int64] = np.where(doubt_L <= allowed_HL, sizes_L, 0).max(axis=-1)
    return prefix

"""How sure one has to be before a front freezes: the less it saves, the surer."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def saved_by(step_F: npt.ArrayLike) -> Floats:
    """saved_L: what freezing the front up to each layer saves of a step, from 0 to 1.

    step_F: FLOPs of a step with a front of 0, 1, ... L layers frozen, as shares of a full step's. With all of them
    frozen a training may end, so that the last front saves the whole step.
    """
    saved_L: Floats = 1 - np.asarray(step_F, dtype=np.float64)[1:]
    saved_L[-1] = 1
    return saved_L


def front_of(probability_L: npt.ArrayLike, saved_L: Floats, threshold: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Layers in the largest front that may freeze at a threshold, or at each of several: of the threshold's shape.

    A front is as sure as its least sure layer. Its doubt, 1 less the probability, may be at most that of the threshold
    times what it saves: the accuracy that is put at risk then stands in one proportion to the FLOPs saved, wherever
    layers freeze. A first layer alone, which saves little, has to be almost certain.
    """
    doubt_L = 1 - np.minimum.accumulate(np.asarray(probability_L, dtype=np.float64))
    allowed_HL = (1 - np.asarray(threshold, dtype=np.float64))[..., None] * saved_L
    sizes_L = np.arange(1, len(saved_L) + 1)
    front: npt.NDArray[np.int64] = np.where(doubt_L <= allowed_HL, sizes_L, 0).max(axis=-1)
    return front

"""What is known of a layer at a snapshot besides the motion of its weights: the clock, and what it would still gain.

The first three are a clock. The others are there because of what freezing really did to trainings: the harm of freezing
a front is what its layers would still have gained, and to first order a layer's gain is its gradient times its motion.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLOCK = ("progress", "depth", "log_lr")
"""What is known without looking at the network."""
GAINS = ("log_distance", "front_distance", "log_gain", "log_front_gain", "log_front_share", "log_gradient")
SIGNALS = (*CLOCK, *GAINS)
_LOWEST_LOG_LR = -10.0
_SMALL_DISTANCE = 1e-4
_SMALL_SHARE = 1e-4
_SMALL = 1e-6
_EPS = 1e-8
_NO_GAIN = 1e-12


def depth_of(layers: int) -> NDArray[np.float64]:
    """depth_L of so many layers: 0 for the first, 1 for the last before the head."""
    return np.arange(layers) / max(layers - 1, 1)


def log_lr(lr: float, peak: float) -> float:
    """The signal log_lr of one snapshot, `peak` being the highest learning rate so far."""
    return max(math.log(max(lr / max(peak, 1e-30), 1e-30)), _LOWEST_LOG_LR)


def distance_of(now_TLK: Tensor, first_LK: Tensor) -> Tensor:
    """distance_TL: how far a layer's sampled weights are from those at step 0, relative to the weights now.

    Both by the root mean square.
    """
    return rms(now_TLK - first_LK) / (rms(now_TLK) + _EPS)


def moves_of(now_TLK: Tensor, before_TLK: Tensor, steps_T: Tensor, size_L: Tensor) -> Tensor:
    """move_TL: the length of one optimizer step of a layer, estimated from K of its `size` weights at two snapshots.

    steps_T: optimizer steps between the two. The steps are taken for a random walk, whose distance grows with the root
    of their number.
    """
    return rms(now_TLK - before_TLK) * (size_L / steps_T.clamp_min(1)[:, None]).sqrt()


def signals_of(
    step_T: Tensor, log_lr_T: Tensor, distance_TL: Tensor, gradient_TL: Tensor, move_TL: Tensor, total_steps: int
) -> Tensor:
    """The signals of every layer at every snapshot: signals_TLS, in the order of SIGNALS.

    progress: the share of the training that is done, 0 to 1. depth: the layer's place, 0 for the first and 1 for the
    last before the head. log_lr: logarithm of the learning rate over the highest so far, at least -10.
    log_distance: logarithm of `distance_of`; front_distance: its mean over the layer and all before it.
    log_gain: logarithm of gradient * move * (remaining steps / 2), which is to first order what the layer's training
        will still take off the loss where its steps follow the gradient and shrink to zero by the end; log_front_gain:
        of the sum over the layer and all before it; log_front_share: of that sum's share in the sum over all layers.
    log_gradient: logarithm of the norm of all layers' gradients.

    gradient_TL: norms of the layers' gradients; NaN, where there are none yet, counts as 0. move_TL: from `moves_of`.
    All on the CPU.
    """
    # NumPy: at run time there is one snapshot of a few layers, and the time is that of the calls.
    step_T1, log_lr_T1 = step_T.numpy()[:, None], log_lr_T.numpy()[:, None]
    gradient_TL = np.nan_to_num(gradient_TL.numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    layers = gradient_TL.shape[1]
    rate_TL = gradient_TL * move_TL.numpy()
    front_TL = rate_TL.cumsum(axis=1)
    remaining_T1 = np.maximum(total_steps - step_T1, 0) / 2 + 1
    log_distance_TL = np.log(distance_TL.numpy() + _SMALL_DISTANCE)
    columns = (
        step_T1 / total_steps,
        depth_of(layers),
        log_lr_T1,
        log_distance_TL,
        log_distance_TL.cumsum(axis=1) / np.arange(1, layers + 1),
        np.log(rate_TL * remaining_T1 + _SMALL),
        np.log(front_TL * remaining_T1 + _SMALL),
        np.log(front_TL / (front_TL[:, -1:] + _NO_GAIN) + _SMALL_SHARE),
        np.log(np.sqrt(np.square(gradient_TL).sum(axis=1, keepdims=True)) + _SMALL),
    )
    signals_TLS = np.empty((*gradient_TL.shape, len(columns)), dtype=np.float32)
    for place, column in enumerate(columns):
        signals_TLS[..., place] = column
    return torch.from_numpy(signals_TLS)


def recorded_signals(
    weights_TLK: Tensor, gradient_TL: Tensor, step_T: Tensor, lr_T: Tensor, size_L: Tensor, total_steps: int
) -> Tensor:
    """signals_TLS of a whole recording.

    Of all layers' sampled weights, gradient norms and learning rates at T snapshots, the first of them at step 0.
    """
    peak_T = torch.cummax(lr_T.double(), dim=0).values
    log_lr_T = torch.tensor([log_lr(*pair) for pair in zip(lr_T.tolist(), peak_T.tolist(), strict=True)])
    before_TLK = torch.cat([weights_TLK[:1], weights_TLK[:-1]])
    steps_T = torch.cat([step_T.new_ones(1), step_T.diff()])
    distance_TL = distance_of(weights_TLK, weights_TLK[0])
    move_TL = moves_of(weights_TLK, before_TLK, steps_T.float(), size_L.float())
    return signals_of(step_T, log_lr_T, distance_TL, gradient_TL, move_TL, total_steps)


def rms(values: Tensor) -> Tensor:
    """The root mean square over the last dimension."""
    norm: Tensor = torch.linalg.vector_norm(values.float(), dim=-1)
    return norm / math.sqrt(values.shape[-1])

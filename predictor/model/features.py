"""The formulas of what the predictor sees: features of a snapshot, of the motion in a window, and tokens of both."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from predictor.errors import UsageError
from predictor.model.config import FEATURES, PredictorConfig
from predictor.model.sampling import thinned

_EPS = 1e-8
_LOWEST_LOG_LR = -10.0
_SMALL_DISTANCE = 1e-4
_SMALL_SHARE = 1e-4
_SMALL = 1e-6
_NO_GAIN = 1e-12


def snapshot_features(
    progress: float,
    remaining_steps: int,
    log_lr: float | NDArray[np.float64],
    distance_L: Tensor,
    gradient_L: Tensor,
    move_L: Tensor,
) -> Tensor:
    """The features of every layer at one snapshot: features_LF, float32, in the order of FEATURES.

    The cost of freezing a prefix is what its layers would still have gained. To first order a layer's gain is its
    gradient times its motion. That is why the gains are here, beside the clock.

    ==================  ============================================================================================
    progress            share of the training that is done, 0 to 1
    depth               index of the layer over that of the last one before the head, 0 to 1
    log_lr              see `log_lr`
    log_distance        log of `distance`
    front_distance      mean of log_distance over the layer and all before it
    log_gain            log of gradient * move * (remaining steps / 2 + 1): what the layer's training will still take
                        off the loss, to first order, if its steps follow the gradient and shrink to zero by the end
    log_front_gain      log of the sum of that over the layer and all before it
    log_front_share     log of the share of that sum in the sum over all layers
    log_gradient        log of the norm of all layers' gradients
    ==================  ============================================================================================

    Args:
        progress: steps done over all steps.
        remaining_steps: optimizer steps to the end of the training.
        log_lr: from `log_lr`, of all layers or one for each.
        distance_L: from `distance`.
        gradient_L: norms of the layers' gradients; 0 for a layer that has had none yet.
        move_L: from `move`.
    """
    # NumPy, because these arrays are so small that the time goes into the calls.
    norm_L = gradient_L.numpy()
    layers = len(norm_L)
    rate_L = norm_L * move_L.numpy()
    prefix_L = rate_L.cumsum()
    remaining = max(remaining_steps, 0) / 2 + 1
    log_distance_L = np.log(distance_L.numpy() + _SMALL_DISTANCE)
    columns = (
        progress,
        depth(layers),
        log_lr,
        log_distance_L,
        log_distance_L.cumsum() / np.arange(1, layers + 1),
        np.log(rate_L.astype(np.float64) * remaining + _SMALL),
        np.log(prefix_L.astype(np.float64) * remaining + _SMALL),
        np.log(prefix_L / (prefix_L[-1:] + _NO_GAIN) + _SMALL_SHARE),
        np.log(np.sqrt(np.square(norm_L).sum(keepdims=True)) + _SMALL),
    )
    features_LF = np.empty((layers, len(columns)), dtype=np.float32)
    for index, column in enumerate(columns):
        features_LF[:, index] = column
    return torch.from_numpy(features_LF)


def depth(layers: int) -> NDArray[np.float64]:
    """depth_L: 0 for the first of so many layers, 1 for the last."""
    return np.arange(layers) / max(layers - 1, 1)


def log_lr(lr: float, peak: float) -> float:
    """The logarithm of a learning rate over `peak`, the highest so far. At least -10."""
    return max(math.log(max(lr / max(peak, 1e-30), 1e-30)), _LOWEST_LOG_LR)


def distance(now_LK: Tensor, first_LK: Tensor) -> Tensor:
    """distance_L: the root mean square (RMS) of the weights' change since the start, over the RMS of the weights."""
    return rms(now_LK - first_LK) / (rms(now_LK) + _EPS)


def move(now_LK: Tensor, before_LK: Tensor, steps: int, size_L: Tensor) -> Tensor:
    """move_L: the length of one optimizer step of each layer, estimated from two snapshots.

    The steps are taken for a random walk, whose distance grows with the root of their number.

    Args:
        now_LK: the sampled weights.
        before_LK: the same, `steps` optimizer steps ago.
        steps: optimizer steps between the two.
        size_L: how many weights each layer holds.
    """
    return rms(now_LK - before_LK) * (size_L / max(float(steps), 1.0)).sqrt()


def motion(weights_BWK: Tensor) -> Tensor:
    """How the weights of a window moved at each of its T = W - 1 steps: motion_BTM, in the order of MOTION.

    With w_t the sampled weights, s the RMS of the newest, and d_t = (w_t - w_(t-1)) / s:

    ==================  ====================================================================
    log_step            log RMS(d_t)
    cosine              between d_t and d_(t-1); 0 at the first
    log_displacement    log RMS((w_t - w_0) / s)
    straightness        that displacement over the path, which is the sum of RMS(d_i) up to t
    change_of_log_step  log_step less the one before; 0 at the first
    evenness            mean |d_t| / RMS(d_t): small where few weights do all the moving
    ==================  ====================================================================

    None of them changes with the layer's scale, nor with the order or, in expectation, the number of the weights.
    """
    scale_B11 = rms(weights_BWK[:, -1:]).unsqueeze(-1) + _EPS
    scaled_BWK = weights_BWK / scale_B11
    steps_BTK = scaled_BWK.diff(dim=1)
    size_BT = rms(steps_BTK)
    displacement_BT = rms(scaled_BWK[:, 1:] - scaled_BWK[:, :1])
    log_step_BT = (size_BT + _EPS).log()
    cosine_BT = F.cosine_similarity(steps_BTK[:, 1:], steps_BTK[:, :-1], dim=-1, eps=_EPS)
    columns = (
        log_step_BT,
        F.pad(cosine_BT, (1, 0)),
        (displacement_BT + _EPS).log(),
        displacement_BT / (size_BT.cumsum(dim=1) + _EPS),
        F.pad(log_step_BT.diff(dim=1), (1, 0)),
        steps_BTK.abs().mean(dim=-1) / (size_BT + _EPS),
    )
    return torch.stack(columns, dim=-1)


def tokens(config: PredictorConfig, weights_BWK: Tensor, features_BWF: Tensor) -> Tensor:
    """What the network takes of windows: tokens_BTD, not yet scaled, D being `config.width`.

    A token holds the motion at one step of the window and the features at its end; with `inputs="raw"` it is one
    snapshot's weights, and T is W.

    Args:
        config: says which of the features are in a token, and of how many weights.
        weights_BWK: the sampled weights, oldest snapshot first. Of more than the configured K, K are taken.
        features_BWF: the features at the same snapshots, in the order of FEATURES. The clock's are enough where the
            predictor takes no others.

    Raises UsageError for windows of another length, and for fewer weights or features than the predictor needs.
    """
    if weights_BWK.shape[1] != config.window or weights_BWK.shape[2] < config.weights:
        raise UsageError(
            f"windows of shape {tuple(weights_BWK.shape)}: this predictor needs {config.window} snapshots of at least "
            f"{config.weights} weights"
        )
    count = len(config.features)
    if features_BWF.shape[-1] < count:
        raise UsageError(f"{features_BWF.shape[-1]} features: this predictor needs {', '.join(FEATURES[:count])}")
    weights_BWK = thinned(weights_BWK, config.weights).float()
    if config.inputs == "raw":
        return weights_BWK
    return torch.cat([motion(weights_BWK), features_BWF[:, 1:, :count].float()], dim=-1)


def rms(values: Tensor) -> Tensor:
    """The root mean square over the last dimension."""
    norm: Tensor = torch.linalg.vector_norm(values.float(), dim=-1)
    return norm / math.sqrt(values.shape[-1])

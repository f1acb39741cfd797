"""What the predictor sees of a training: the one definition, for a training under way and for recorded ones."""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from predictor.model.config import FEATURES
from predictor.model.features import distance, log_lr, move, snapshot_features

_DROP = 1 / 3
"""A learning rate that stood still has dropped when it falls below this share of itself."""
_LOG_LR = FEATURES.index("log_lr")


class LayerHistory:
    """Each layer's last snapshots and their features.

        history = LayerHistory([layer.size for layer in layers], total_steps, window=10)
        for every snapshot:
            if history.update(step, lr, weights_LK, gradient_norms_L, frozen) and history.ready:
                probability_B = model(tokens(config, *history.windows(active)))

    The policy calls `update` while it trains. The data set calls it with the snapshots of a recorded run. So both see
    the same features.

    A snapshot at which nothing has moved since the one before says nothing about what is left to learn: all steps
    between them were skipped, as by a GradScaler, or taken at a rate of zero. It is left out. The steps before it are
    then not counted as steps between the snapshots around it.

    A layer whose gradient norm is not finite keeps its last gradient and motion.

    Where a learning rate that stood still drops, the window begins anew. Weights then move less, which looks like a
    layer that is ready, while the network is about to gain most.

    Args:
        sizes_L: how many weights each layer holds, front to back.
        total_steps: optimizer steps of the whole training.
        window: snapshots in a window.
        fade_frozen: what happens to the gradient and motion of a frozen layer. If true, they change by the same factor
            as those of the layers that train, as they would if nothing were frozen. A predictor that has learned from
            outcomes needs that: a gain kept from the moment of freezing would count against all layers behind it. If
            false, they stay at their last value.
    """

    def __init__(
        self, sizes_L: Sequence[int] | Tensor, total_steps: int, window: int, fade_frozen: bool = False
    ) -> None:
        self.total_steps = total_steps
        self.window = window
        self.fade_frozen = fade_frozen
        self.length = 0
        """Snapshots since the start, or since the last drop of the learning rate."""
        self._size_L = torch.as_tensor(sizes_L, dtype=torch.float32)
        self._weights: deque[Tensor] = deque(maxlen=window)  # weights_LK of each snapshot
        self._features: deque[Tensor] = deque(maxlen=window)  # features_LF
        self._first_LK: Tensor | None = None  # the weights at the first snapshot
        self._gradient_L = torch.zeros(len(self._size_L))
        self._move_L = torch.zeros(len(self._size_L))
        self._step = 0  # of the newest snapshot, or of one after it at which nothing had moved
        self._peak_lr = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is a whole window of snapshots."""
        return len(self._weights) == self.window

    @property
    def features_LF(self) -> Tensor:
        """The features at the newest snapshot, in the order of FEATURES."""
        return self._features[-1]

    def windows(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """weights_BWK and features_BWF of these layers, oldest snapshot first."""
        weights_BWK, features_BWF = (
            torch.stack(list(rows), dim=1)[list(layers)] for rows in (self._weights, self._features)
        )
        return weights_BWK, features_BWF

    def update(
        self,
        step: int,
        lr: float,
        weights_LK: Tensor,
        gradient_norms_L: Tensor,
        frozen: Collection[int] = frozenset(),
    ) -> bool:
        """Take a snapshot, and say whether it is evidence. The first always is.

        Args:
            step: optimizer steps done.
            lr: learning rate of the last of them, or of the first one at step 0.
            weights_LK: sampled weights of all layers, on the CPU.
            gradient_norms_L: norms of the layers' gradients at that step; NaN for a layer without one.
            frozen: indices of the layers that are frozen now.
        """
        if self._first_LK is None:
            self._first_LK = weights_LK
        elif not _moved(weights_LK, self._weights[-1], frozen):
            self._step = step
            return False
        before_LK = self._weights[-1] if self._weights else weights_LK
        self._update_gains(weights_LK, before_LK, step - self._step, gradient_norms_L, frozen)
        self._peak_lr = max(self._peak_lr, lr)
        rate = log_lr(lr, self._peak_lr)
        if self._has_dropped(rate):
            self._weights.clear()
            self._features.clear()
            self.length = 0
        self._weights.append(weights_LK)
        self._features.append(
            snapshot_features(
                step / self.total_steps,
                self.total_steps - step,
                rate,
                distance(weights_LK, self._first_LK),
                self._gradient_L,
                self._move_L,
            )
        )
        self._step = step
        self.length += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """The window and what the next features are computed from: tensors and numbers."""
        return {
            "snapshots": list(self._weights),
            "signals": list(self._features),
            "first": self._first_LK,
            "gradient": self._gradient_L,
            "move": self._move_L,
            "step": self._step,
            "peak_lr": self._peak_lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for window, rows in ((self._weights, state["snapshots"]), (self._features, state["signals"])):
            window.clear()
            window.extend(row.cpu() for row in rows)
        first_LK = state["first"]
        self._first_LK = None if first_LK is None else first_LK.cpu()
        self._gradient_L, self._move_L = state["gradient"].cpu(), state["move"].cpu()
        self._step, self._peak_lr = state["step"], state["peak_lr"]
        self.length = len(self._weights)

    def _has_dropped(self, rate: float) -> bool:
        """Whether the learning rate, given as the feature log_lr, stood still and has now dropped.

        The predictor has learned from schedules that fall steadily or not at all.
        """
        if len(self._features) < 2:
            return False
        before, last = (float(features_LF[0, _LOG_LR]) for features_LF in (self._features[-2], self._features[-1]))
        return before == last and rate < last + math.log(_DROP)

    def _update_gains(
        self, now_LK: Tensor, before_LK: Tensor, steps: int, gradient_norms_L: Tensor, frozen: Collection[int]
    ) -> None:
        """Bring gradient and motion up to date where a layer has a gradient."""
        trained_L = gradient_norms_L.isfinite()
        if not trained_L.any():
            return
        move_L = move(now_LK, before_LK, steps, self._size_L)
        fading_L = torch.zeros(len(now_LK), dtype=torch.bool)
        if self.fade_frozen:
            fading_L[list(frozen)] = True
        self._move_L = _updated(self._move_L, move_L, trained_L, fading_L)
        self._gradient_L = _updated(self._gradient_L, gradient_norms_L, trained_L, fading_L)


def _moved(now_LK: Tensor, before_LK: Tensor, frozen: Collection[int]) -> bool:
    """Whether a sampled weight of a layer that is not frozen has changed."""
    moved_L = (now_LK != before_LK).any(dim=1)
    moved_L[list(frozen)] = False
    return bool(moved_L.any())


def _updated(before_L: Tensor, now_L: Tensor, trained_L: Tensor, fading_L: Tensor) -> Tensor:
    """`now_L` for the layers that train. A fading one changes by their common factor, others keep their value."""
    both_L = trained_L & (before_L > 0)
    if fading_L.any() and both_L.any():
        change = now_L[both_L].norm() / before_L[both_L].norm()
        before_L = before_L.where(~fading_L, before_L * change)
    return now_L.where(trained_L, before_L)

"""What the predictor sees of a training: the one definition, for a training under way and for recorded ones."""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from predictor.model.config import FEATURES
from predictor.model.features import distance, move, snapshot_features
from predictor.model.learning_rate import RateSoFar

_DROP = 1 / 3
"""A learning rate that stood still has dropped when it falls below this share of itself."""
_FALL = 1 / 4
"""A learning rate falls steeply if, going on like that, it would reach zero within this share of the time left."""
_FAR_BELOW = 1 / 100
"""A first rise has hardly begun at a learning rate below this share of the one that it leads to."""
_PROGRESS, _LOG_LR = FEATURES.index("progress"), FEATURES.index("log_lr")


class LayerHistory:
    """Each layer's last snapshots and their features.

        history = LayerHistory([layer.size for layer in layers], total_steps, window=10)
        for every snapshot:
            if history.update(step, lr, weights_LK, gradient_norms_L, frozen):
                indices = history.with_window(active)
                probability_B = model(tokens(config, *history.windows(indices)))

    The policy calls `update` while it trains. The data set calls it with the snapshots of a recorded run. So both see
    the same features.

    **Motion.** A snapshot at which nothing has moved since the one before says nothing about what is left to learn: all
    steps between them were skipped, as by a GradScaler, or taken at a rate of zero. It is left out. The steps before it
    are then not counted as steps between the snapshots around it. Likewise for a single layer: where it has not moved,
    has a gradient of exactly zero or is held still by the user, it has no window, and its window begins anew when it
    moves again.

    **Gradients.** A layer whose gradient norm is not finite keeps its last gradient and motion. Before its first
    gradient a layer looks as if there were nothing left to learn, so that its window begins right before that.

    **Learning rate.** Weights move less at a lower rate, which looks like a layer that is ready, while the network may
    be about to gain most, or the rate about to rise again. So a layer's window begins anew at each snapshot at which
    its rate

    - has dropped: it stood still, and is now below a third of that;
    - falls steeply: at its mean fall since the window began it would reach zero in a quarter of the time that is left,
      less the window itself, by which a mean lags behind. A cosine to the end of the training never does. One that
      ends sooner, and may rise again, does;
    - has risen again: to twice its lowest since it was at its peak, which was below half of that. A warm-up is no such
      rise;
    - has risen before and is low: below the peak times the share of the training that is left.

    Args:
        sizes_L: how many weights each layer holds, front to back.
        total_steps: optimizer steps of the whole training.
        window: snapshots in a window.
        fade_frozen: what happens to the gradient and motion of a layer that is frozen or held still. If true, they
            change by the same factor as those of the layers that train, as they would if nothing were frozen. A
            predictor that has learned from outcomes needs that: a gain kept from the moment of freezing would count
            against all layers behind it. If false, they stay at their last value.
        needs_gradients: whether a window needs gradients.
    """

    def __init__(
        self,
        sizes_L: Sequence[int] | Tensor,
        total_steps: int,
        window: int,
        fade_frozen: bool = False,
        needs_gradients: bool = True,
    ) -> None:
        layers = len(sizes_L)
        self.total_steps = total_steps
        self.window = window
        self.fade_frozen = fade_frozen
        self.needs_gradients = needs_gradients
        self.length_L = [0] * layers
        """Of each layer, the snapshots since its window began."""
        self.still_L = [0] * layers
        """Of each layer, the newest snapshots in a row at which it had not moved, or had a gradient of zero."""
        self._size_L = torch.as_tensor(sizes_L, dtype=torch.float32, device="cpu")
        self._weights: deque[Tensor] = deque(maxlen=window)  # weights_LK of each snapshot
        self._features: deque[Tensor] = deque(maxlen=window)  # features_LF
        self._first_LK: Tensor | None = None  # the weights at the first snapshot
        self._gradient_L = torch.zeros(layers, dtype=torch.float32, device="cpu")
        self._move_L = torch.zeros(layers, dtype=torch.float32, device="cpu")
        self._step = 0  # of the newest snapshot, or of one after it at which nothing had moved
        self._rates = [RateSoFar() for _ in range(layers)]

    @property
    def length(self) -> int:
        """Snapshots in the longest window, of any layer."""
        return max(self.length_L, default=0)

    @property
    def ready(self) -> bool:
        """Whether a layer has a whole window of snapshots."""
        return self.length >= self.window

    @property
    def features_LF(self) -> Tensor:
        """The features at the newest snapshot, in the order of FEATURES."""
        return self._features[-1]

    def with_window(self, layers: Sequence[int]) -> list[int]:
        """Those of the layers that have a whole window."""
        return [index for index in layers if self.length_L[index] >= self.window]

    def at_rest(self, layers: Sequence[int]) -> set[int]:
        """Those of the layers that nothing has trained for as long as a window takes."""
        return {index for index in layers if self.still_L[index] >= self.window - 1}

    def wait_for_rise(self, named_L: Sequence[float]) -> None:
        """Begin windows anew where a rate has not fallen so far, and is far below the one that is named for it."""
        for index, (rate, named) in enumerate(zip(self._rates, named_L, strict=True)):
            if rate.now == rate.lowest == rate.peak < _FAR_BELOW * named:
                self.length_L[index] = min(self.length_L[index], 1)

    def windows(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """weights_BWK and features_BWF of these layers, oldest snapshot first."""
        weights_BWK, features_BWF = (
            torch.stack(list(rows), dim=1)[list(layers)] for rows in (self._weights, self._features)
        )
        return weights_BWK, features_BWF

    def update(
        self,
        step: int,
        lr: float | Sequence[float],
        weights_LK: Tensor,
        gradient_norms_L: Tensor,
        frozen: Collection[int] = frozenset(),
        resting: Collection[int] = frozenset(),
    ) -> bool:
        """Take a snapshot, and say whether it is evidence. The first always is.

        Args:
            step: optimizer steps done.
            lr: learning rate of the last of them, or of the first one at step 0; of all layers, or one for each.
            weights_LK: sampled weights of all layers, on the CPU.
            gradient_norms_L: norms of the layers' gradients at that step; NaN for a layer without one.
            frozen: indices of the layers that are frozen now.
            resting: indices of the layers that the user holds still now.
        """
        if self._first_LK is None:
            self._first_LK = before_LK = weights_LK
            moved_L = [True] * len(weights_LK)
        else:
            before_LK = self._weights[-1]
            moved_L = (weights_LK != before_LK).any(dim=1).tolist()
        idle = {index for index, moved in enumerate(moved_L) if not moved}
        held = {*frozen, *resting}
        evidence = len(idle | held) < len(moved_L) or not self._weights
        if evidence:
            self._update_gains(weights_LK, before_LK, step - self._step, gradient_norms_L, idle | held)
            self._append(step, lr, weights_LK)
            idle |= set(torch.nonzero(gradient_norms_L == 0).flatten().tolist())  # weight decay alone may move these
            self._count(idle, idle | held)
        else:
            self.length_L = [0 if index in held else length for index, length in enumerate(self.length_L)]
        self._step = step
        return evidence

    def restart(self, layers: Collection[int], weights_LK: Tensor, sizes_L: Sequence[int]) -> None:
        """Forget the weights of these layers so far, since others of theirs are sampled from now on.

        Args:
            layers: indices of layers.
            weights_LK: what is sampled now, of all layers.
            sizes_L: as at the beginning.
        """
        self._size_L = torch.as_tensor(sizes_L, dtype=torch.float32, device="cpu")
        anew_L1 = torch.zeros(len(weights_LK), 1, dtype=torch.bool, device="cpu")
        anew_L1[list(layers)] = True
        for row in range(len(self._weights)):
            self._weights[row] = weights_LK.where(anew_L1, self._weights[row])
        if self._first_LK is not None:
            self._first_LK = weights_LK.where(anew_L1, self._first_LK)
        for index in layers:
            self.length_L[index] = 0

    def state_dict(self) -> dict[str, Any]:
        """The window and what the next features are computed from: tensors, numbers and lists of them."""
        return {
            "snapshots": list(self._weights),
            "signals": list(self._features),
            "first": self._first_LK,
            "gradient": self._gradient_L,
            "move": self._move_L,
            "step": self._step,
            "lengths": list(self.length_L),
            "still": list(self.still_L),
            "rates": [asdict(rate) for rate in self._rates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also from one of an earlier version, in which all layers had one window and one rate."""
        for window, rows in ((self._weights, state["snapshots"]), (self._features, state["signals"])):
            window.clear()
            window.extend(row.cpu() for row in rows)
        first_LK = state["first"]
        self._first_LK = None if first_LK is None else first_LK.cpu()
        self._gradient_L, self._move_L = state["gradient"].cpu(), state["move"].cpu()
        self._step = state["step"]
        layers = len(self._gradient_L)
        self.length_L = list(state.get("lengths", [len(self._weights)] * layers))
        self.still_L = list(state.get("still", [0] * layers))
        former = {"peak": state.get("peak_lr", 0.0), "lowest": state.get("peak_lr", 0.0), "snapshots": 2}
        self._rates = [RateSoFar(**rate) for rate in state.get("rates", [former] * layers)]

    def _append(self, step: int, lr: float | Sequence[float], weights_LK: Tensor) -> None:
        """Add a snapshot and its features."""
        assert self._first_LK is not None
        for rate, now in zip(self._rates, [lr] * len(self._rates) if isinstance(lr, float | int) else lr, strict=True):
            rate.note(now)
        self._weights.append(weights_LK)
        self._features.append(
            snapshot_features(
                step / self.total_steps,
                self.total_steps - step,
                np.array([rate.log for rate in self._rates]),
                distance(weights_LK, self._first_LK),
                self._gradient_L,
                self._move_L,
            )
        )

    def _count(self, idle: Collection[int], without_window: Collection[int]) -> None:
        """Count the newest snapshot of each layer."""
        progress_T = [float(row_LF[0, _PROGRESS]) for row_LF in self._features]
        log_rate_LT = torch.stack([row_LF[:, _LOG_LR] for row_LF in self._features], dim=1).tolist()
        for index, length in enumerate(self.length_L):
            self.still_L[index] = self.still_L[index] + 1 if index in idle else 0
            window = min(length + 1, len(progress_T))
            anew = self.needs_gradients and float(self._gradient_L[index]) == 0
            anew = anew or self._rates[index].rose or self._rates[index].may_rise_again(progress_T[-1])
            anew = anew or _has_dropped(log_rate_LT[index][-window:])
            anew = anew or _falls_steeply(progress_T[-window:], log_rate_LT[index][-window:])
            self.length_L[index] = 0 if index in without_window else 1 if anew else length + 1

    def _update_gains(
        self, now_LK: Tensor, before_LK: Tensor, steps: int, gradient_norms_L: Tensor, still: Collection[int]
    ) -> None:
        """Bring gradient and motion up to date where a layer has a gradient."""
        trained_L = gradient_norms_L.isfinite()
        if not trained_L.any():
            return
        move_L = move(now_LK, before_LK, steps, self._size_L)
        fading_L = torch.zeros(len(now_LK), dtype=torch.bool, device="cpu")
        if self.fade_frozen:
            fading_L[list(still)] = True
        self._move_L = _updated(self._move_L, move_L, trained_L, fading_L)
        self._gradient_L = _updated(self._gradient_L, gradient_norms_L, trained_L, fading_L)


def _has_dropped(log_rate_W: Sequence[float]) -> bool:
    """Whether a learning rate stood still and has now dropped. The predictor has not learned from such windows."""
    if len(log_rate_W) < 3:
        return False
    before, last, now = log_rate_W[-3:]
    return before == last and now < last + math.log(_DROP)


def _falls_steeply(progress_W: Sequence[float], log_rate_W: Sequence[float]) -> bool:
    """Whether a learning rate, at its mean fall over a window, would reach zero long before the end of the training."""
    share = math.exp(log_rate_W[-1] - log_rate_W[0])
    elapsed = progress_W[-1] - progress_W[0]
    # The mean is that of the window's middle, and a schedule that ends with the training is steeper by its end.
    return share < 1 and elapsed * share / (1 - share) < _FALL * (1 - progress_W[-1] - elapsed)


def _updated(before_L: Tensor, now_L: Tensor, trained_L: Tensor, fading_L: Tensor) -> Tensor:
    """`now_L` for the layers that train. A fading one changes by their common factor, others keep their value."""
    both_L = trained_L & (before_L > 0)
    if fading_L.any() and both_L.any():
        change = now_L[both_L].norm() / before_L[both_L].norm()
        before_L = before_L.where(~fading_L, before_L * change)
    return now_L.where(trained_L, before_L)

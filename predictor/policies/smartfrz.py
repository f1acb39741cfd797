"""SmartFRZ: an attention model judges each layer by how its weights have been moving."""

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.freezing.freeze import is_frozen
from predictor.freezing.learning_rates import innermost
from predictor.layers.layer import Layer
from predictor.model.decision import Floats, front_of, saved_by
from predictor.model.features import CLOCK, SIGNALS, distance_of, log_lr, moves_of, signals_of
from predictor.model.file import load_predictor
from predictor.model.sampling import LayerSampler
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import gradient_norms, gradients

SHIPPED = Path(__file__).parent.parent / "weights" / "smartfrz.safetensors"
_PATIENCE = 2
"""Snapshots without gradients after which they are taken to be cleared too early."""
_DROP = 1 / 3
"""A learning rate that stood still has dropped where it falls below this share of itself."""


class SmartFRZPolicy(FreezePolicy):
    """Freezes each layer that a trained predictor judges to have learnt what it will learn.

    Paper: SmartFRZ (Li et al., ICLR 2023, arXiv 2401.16720). Rule: at every snapshot, each active layer's last W
    snapshots of K sampled weights go through the attention model; the layer freezes when its probability reaches the
    threshold, and stays frozen. Where the predictor has learnt what freezing costs, as the one that ships has, a front
    has to be the surer the less it saves (`predictor.model.decision`), and the threshold is that of a front that saves
    a whole step. Signal: the weights' own motion, how far they are from where they began, gradient times motion,
    learning rate, progress and depth. Differs: the paper's predictor sees the raw weights alone, which in our
    measurements does not carry over to another architecture; ours has learnt what freezing a front did to the loss, the
    paper's how alike activations are; the paper weighs no FLOPs; `prefix` keeps the frozen set a front, where freezing
    saves most, which is an option of third parties; where the learning rate drops, from which a network gains most,
    ours waits until all of the window lies behind the drop. Cost: one gather and one gradient norm a layer and one
    small batch through the predictor at each of about 60 snapshots a run; where it weighs, one pass forward in which
    FLOPs are counted.

    predictor: a file from `python -m predictor train`; the one that ships by default. threshold: the probability from
    which a layer freezes; the file's own by default. risk: the percentage points of accuracy that may be lost, in place
    of a threshold. prefix: freeze a layer only together with all before it. votes: judgements in a row that it takes.
    front: the share of the layers that freezes before the first step, unjudged: for pretrained networks, whose first
    layers are best frozen before they are disturbed.
    """

    def __init__(
        self,
        predictor: str | Path | None = None,
        threshold: float | None = None,
        prefix: bool = True,
        votes: int = 1,
        risk: float | None = None,
        front: float = 0.0,
    ) -> None:
        if predictor is None and not SHIPPED.exists():
            raise UsageError("smartfrz needs a predictor: give predictor=PATH, from `python -m predictor train`")
        file = load_predictor(SHIPPED if predictor is None else predictor)
        if threshold is not None and risk is not None:
            raise UsageError(f"threshold={threshold}, risk={risk}: give one of them; a risk stands for a threshold")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UsageError(f"threshold={threshold}: give a probability, from 0 to 1")
        if votes < 1:
            raise UsageError(f"votes={votes}: give a number of decisions, from 1")
        if not 0 <= front <= 1:
            raise UsageError(f"front={front}: give a share of the layers, from 0 to 1")
        if risk is not None:
            threshold = file.threshold_for(risk)
        self.threshold = file.threshold if threshold is None else threshold
        self.prefix = prefix
        self.wants_flops = prefix and file.weighs  # to weigh them against doubt
        self._fades = file.weighs
        self.votes = votes
        self.front = front
        self._votes: dict[int, int] = {}  # decisions in a row at which an active layer was judged ready
        self._model = file.model
        self._spec = file.spec
        self._snapshots: deque[Tensor] = deque(maxlen=file.model.config.window)
        self._signals: deque[Tensor] = deque(maxlen=file.model.config.window)  # signals_LS
        self._peak_lr = 0.0
        self._step = 0  # of the newest snapshot
        self._lr: float | Tensor | None = None  # of the newest step, if there was one since the newest snapshot
        self._noting: RemovableHandle | None = None

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Draw the positions to watch."""
        self.close()
        self._optimizer = optimizer
        self._noting = innermost(optimizer).register_step_post_hook(self._note_lr)
        self._sampler = LayerSampler(layers, self._spec)
        self._size_L = torch.tensor([float(layer.size) for layer in layers])
        self._first_LK: Tensor | None = None  # the weights at the first snapshot
        self._gradient_L = torch.zeros(len(layers))
        self._move_L = torch.zeros(len(layers))
        self._missed = 0  # snapshots in a row without any gradient
        self._saved_L: Floats | None = None

    def due(self, step: int, total_steps: int) -> bool:
        """At every snapshot."""
        return self._spec.due(step, total_steps)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those that the predictor judges ready."""
        self._take(view)
        if view.step == 0:
            return view.frozen | frozenset(range(round(self.front * len(view.layers))))
        if len(self._snapshots) < self._model.config.window or not view.active:
            return view.frozen
        return view.frozen | self._choose(view, self._judge(list(view.active)))

    def state_dict(self) -> dict[str, Any]:
        """The window's snapshots and signals, what they are reckoned from, and the votes so far."""
        return {
            "snapshots": [snapshot.cpu() for snapshot in self._snapshots],
            "signals": list(self._signals),
            "first": self._first_LK,
            "gradient": self._gradient_L,
            "move": self._move_L,
            "step": self._step,
            "peak_lr": self._peak_lr,
            "votes": dict(self._votes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the snapshots again."""
        for window, rows in ((self._snapshots, state["snapshots"]), (self._signals, state["signals"])):
            window.clear()
            window.extend(row.cpu() for row in rows)
        first_LK = state["first"]
        self._first_LK = None if first_LK is None else first_LK.cpu()
        self._gradient_L, self._move_L = state["gradient"].cpu(), state["move"].cpu()
        self._step, self._peak_lr = state["step"], state["peak_lr"]
        self._votes = dict(state["votes"])

    def close(self) -> None:
        """Look at no more steps."""
        if self._noting is not None:
            self._noting.remove()
        self._noting = None

    def __getstate__(self) -> dict[str, Any]:
        # Without the hook: a handle leads to all hooks of the optimizer, which need not bear to be copied.
        return {**self.__dict__, "_noting": None}

    def _note_lr(self, optimizer: Optimizer, *_: object) -> None:
        """Note the rate of the step just taken: in some loops the schedule has gone on when the policy is asked."""
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # a tensor is written over, and reading it waits

    @torch.inference_mode()
    def _take(self, view: View) -> None:
        # Frozen layers are read too: a stack of one shape, and they cost one small gather each.
        now_LK = self._sampler.sample_all().cpu()
        if self._first_LK is None:
            self._first_LK = now_LK
        before_LK = self._snapshots[-1] if self._snapshots else now_LK
        self._watch(view, now_LK, before_LK)
        lr = float(self._optimizer.param_groups[0]["lr"] if self._lr is None else self._lr)
        self._lr = None
        self._peak_lr = max(self._peak_lr, lr)
        rate = log_lr(lr, self._peak_lr)
        if self._has_dropped(rate):
            self._snapshots.clear()
            self._signals.clear()
            self._votes.clear()
        signals_TLS = signals_of(
            torch.tensor([view.step]),
            torch.tensor([rate]),
            distance_of(now_LK, self._first_LK)[None],
            self._gradient_L[None],
            self._move_L[None],
            view.total_steps,
        )
        self._snapshots.append(now_LK)
        self._signals.append(signals_TLS[0])
        self._step = view.step

    def _has_dropped(self, rate: float) -> bool:
        """Whether the learning rate, given as the signal log_lr, has dropped since the last snapshot.

        Weights then move and gradients count by so much less that the predictor, which has learnt from schedules that
        fall steadily or not at all, takes all layers to have learnt, where they are about to gain.
        """
        if len(self._signals) < 2:
            return False
        place = SIGNALS.index("log_lr")
        before, last = (float(signals_LS[0, place]) for signals_LS in (self._signals[-2], self._signals[-1]))
        return before == last and rate < last + math.log(_DROP)

    def _watch(self, view: View, now_LK: Tensor, before_LK: Tensor) -> None:
        """Gradient and motion of the layers that train; in a frozen one they fade with those, or keep their last.

        They fade where the predictor has learnt from outcomes, which are of whole fronts. All keep them where gradients
        are missing or not finite.
        """
        if not view.active or not self._model.config.signals[len(CLOCK) :]:
            return
        trained = [place for place in view.active if gradients(view.layers[place])]
        if not trained:
            if view.step > 0 and not all(is_frozen(view.layers[place]) for place in view.active):
                self._miss(view.step)  # else all that is left is what the user lets stand still
            return
        self._missed = 0
        gradient_L = gradient_norms(view.layers).cpu()
        if not gradient_L[trained].isfinite().all():
            return  # an overflow, whose step a GradScaler leaves out: it says nothing of what is left to learn
        steps_T = torch.tensor([float(view.step - self._step)])
        move_L = moves_of(now_LK[None], before_LK[None], steps_T, self._size_L)[0]
        frozen_L = torch.tensor([self._fades and place in view.frozen for place in range(len(view.layers))])
        trained_L = gradient_L.isfinite()
        self._move_L = _brought_up(self._move_L, move_L, trained_L, frozen_L)
        self._gradient_L = _brought_up(self._gradient_L, gradient_L, trained_L, frozen_L)

    def _miss(self, step: int) -> None:
        """Nothing has a gradient: once that may be a batch that was left out, as Lightning allows it."""
        self._missed += 1
        if self._missed == _PATIENCE:
            # Not to be taken for a network in which nothing is left to learn.
            raise UsageError(
                f"no layer has a gradient at step {step}, nor had one when smartfrz looked before: call "
                "controller.step() after optimizer.step() and before optimizer.zero_grad()"
            )

    @torch.inference_mode()
    def _judge(self, active: list[int]) -> Tensor:
        """The probability that each of these layers may be frozen now."""
        windows_BWK = torch.stack(list(self._snapshots), dim=1)[active]
        signals_BWS = torch.stack(list(self._signals), dim=1)[active]
        probability_B: Tensor = self._model(windows_BWK, signals_BWS).sigmoid()
        return probability_B

    def _choose(self, view: View, probability_B: Tensor) -> set[int]:
        ready = self._ready(view, dict(zip(view.active, probability_B.tolist(), strict=True)))
        self._votes = {place: self._votes.get(place, 0) + 1 for place in ready}
        chosen = {place for place, votes in self._votes.items() if votes >= self.votes}
        if not self.prefix:
            return chosen
        front = 0
        while front in chosen or front in view.frozen:
            front += 1
        return {place for place in chosen if place < front}

    def _ready(self, view: View, probability: dict[int, float]) -> list[int]:
        """The layers that are judged ready, of those whose probabilities are given by their places."""
        if not self.wants_flops:
            return [place for place, p in probability.items() if p >= self.threshold]
        if self._saved_L is None:
            self._saved_L = _saved_by_fronts(view)
        sure_L = [probability.get(place, 1.0) for place in range(len(view.layers))]
        front = front_of(sure_L, self._saved_L, self.threshold)
        return [place for place in probability if place < front]


def _saved_by_fronts(view: View) -> Floats:
    """What each front saves; where FLOPs cannot be counted, every layer is taken to cost the same."""
    count = len(view.layers)
    if view.flops is None:
        return saved_by(np.linspace(1, 0, count + 1))
    return saved_by([view.flops.share(frozenset(range(front))) for front in range(count + 1)])


def _brought_up(before_L: Tensor, now_L: Tensor, trained_L: Tensor, frozen_L: Tensor) -> Tensor:
    """What is now where a layer trains; before, times the others' change, where it is frozen; before, elsewhere.

    In the runs that the predictor has learnt from nothing was frozen, and what a front would still have gained fell
    with the rest. Kept as it was when it froze, it would stand against all layers behind it for good.
    """
    both_L = trained_L & (before_L > 0)
    change = now_L[both_L].norm() / before_L[both_L].norm() if both_L.any() else now_L.new_ones(())
    return now_L.where(trained_L, before_L.where(~frozen_L, before_L * change))

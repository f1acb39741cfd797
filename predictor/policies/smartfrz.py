"""SmartFRZ: an attention model judges each layer by how its weights have been moving."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.attention import load_predictor
from predictor.errors import UsageError
from predictor.freezing.layers import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.sampling import LayerSampler
from predictor.windows import depth_of, log_lr, signals_from

SHIPPED = Path(__file__).parent.parent / "weights" / "smartfrz.safetensors"


class SmartFRZPolicy(FreezePolicy):
    """Freezes each layer that a trained predictor judges to have learnt what it will learn.

    Paper: SmartFRZ (Li et al., ICLR 2023, arXiv 2401.16720). Rule: at every snapshot, each active layer's last W
    snapshots of K sampled weights go through the attention model; the layer freezes when its probability reaches the
    threshold, and stays frozen. Signal: the weights' own motion, learning rate, progress and depth. Differs: the
    paper's predictor sees the raw weights alone, which in our measurements does not carry over to another
    architecture; `prefix` keeps the frozen set a front, where freezing saves most, which is an option of third
    parties. Cost: one gather a layer and one small batch through the predictor at each of about 60 snapshots a run.

    predictor: a file from `python -m predictor train`; the one that ships by default. threshold: the probability from
    which a layer freezes; the file's own by default. prefix: freeze a layer only together with all before it.
    """

    def __init__(
        self,
        predictor: str | Path | None = None,
        threshold: float | None = None,
        prefix: bool = True,
        votes: int = 1,
    ) -> None:
        if predictor is None and not SHIPPED.exists():
            raise UsageError("smartfrz needs a predictor: give predictor=PATH, from `python -m predictor train`")
        file = load_predictor(SHIPPED if predictor is None else predictor)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UsageError(f"threshold={threshold}: give a probability, from 0 to 1")
        if votes < 1:
            raise UsageError(f"votes={votes}: give a number of decisions, from 1")
        self.threshold = file.threshold if threshold is None else threshold
        self.prefix = prefix
        self.votes = votes
        self._votes: dict[int, int] = {}  # decisions in a row at which an active layer was judged ready
        self._model = file.model
        self._spec = file.spec
        self._snapshots: deque[Tensor] = deque(maxlen=file.model.config.window)
        self._signals: deque[list[float]] = deque(maxlen=file.model.config.window)
        self._peak_lr = 0.0

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Draw the positions to watch."""
        self._optimizer = optimizer
        self._sampler = LayerSampler(layers, self._spec)
        self._depth_L = depth_of(len(layers))

    def due(self, step: int, total_steps: int) -> bool:
        """At every snapshot."""
        return self._spec.due(step, total_steps)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those that the predictor judges ready."""
        self._take(view)
        if len(self._snapshots) < self._model.config.window or not view.active:
            return view.frozen
        return view.frozen | self._choose(view, self._judge(list(view.active)))

    def state_dict(self) -> dict[str, Any]:
        """The window's snapshots and signals, and the votes so far."""
        return {
            "snapshots": [snapshot.cpu() for snapshot in self._snapshots],
            "signals": list(self._signals),
            "peak_lr": self._peak_lr,
            "votes": dict(self._votes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the snapshots again."""
        for window, rows in ((self._snapshots, state["snapshots"]), (self._signals, state["signals"])):
            window.clear()
            window.extend(rows)
        self._peak_lr = state["peak_lr"]
        self._votes = dict(state["votes"])

    def _take(self, view: View) -> None:
        # Frozen layers are read too: a stack of one shape, and they cost one small gather each.
        self._snapshots.append(self._sampler.sample_all().cpu())
        lr = float(self._optimizer.param_groups[0]["lr"])
        self._peak_lr = max(self._peak_lr, lr)
        self._signals.append([view.progress, log_lr(lr, self._peak_lr)])

    @torch.inference_mode()
    def _judge(self, active: list[int]) -> Tensor:
        """The probability that each of these layers may be frozen now."""
        windows_BWK = torch.stack(list(self._snapshots), dim=1)[active]
        progress_W, log_lr_W = torch.tensor(list(self._signals)).T
        signals_BWS = signals_from(progress_W, self._depth_L[active], log_lr_W).transpose(0, 1)
        probability_B: Tensor = self._model(windows_BWK, signals_BWS).sigmoid()
        return probability_B

    def _choose(self, view: View, probability_B: Tensor) -> set[int]:
        judged = zip(view.active, probability_B.tolist(), strict=True)
        self._votes = {place: self._votes.get(place, 0) + 1 for place, p in judged if p >= self.threshold}
        ready = {place for place, votes in self._votes.items() if votes >= self.votes}
        if not self.prefix:
            return ready
        front = 0
        while front in ready or front in view.frozen:
            front += 1
        return {place for place in ready if place < front}

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
from predictor.windows import signals_of

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
        self, predictor: str | Path | None = None, threshold: float | None = None, prefix: bool = True
    ) -> None:
        if predictor is None and not SHIPPED.exists():
            raise UsageError("smartfrz needs a predictor: give predictor=PATH, from `python -m predictor train`")
        file = load_predictor(SHIPPED if predictor is None else predictor)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UsageError(f"threshold={threshold}: give a probability, from 0 to 1")
        self.threshold = file.threshold if threshold is None else threshold
        self.prefix = prefix
        self._model = file.model
        self._spec = file.spec
        self._snapshots: deque[Tensor] = deque(maxlen=file.model.config.window)
        self._steps: list[int] = []
        self._rates: list[float] = []
        self._fresh = False

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Draw the positions to watch."""
        self._optimizer = optimizer
        self._sampler = LayerSampler(layers, self._spec)

    def observe(self, view: View) -> None:
        """Take a snapshot where one is due. At step 0 the controller asks `decide` at once, which takes the first."""
        if self._spec.due(view.step, view.total_steps):
            self._take(view.step)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those that the predictor has just judged ready."""
        if view.step == 0:
            self._take(0)
        if not self._fresh or len(self._snapshots) < self._model.config.window or not view.active:
            return view.frozen
        self._fresh = False
        return view.frozen | self._choose(view, self._judge(view))

    def state_dict(self) -> dict[str, Any]:
        """The snapshots of the window, and every snapshot's step and learning rate."""
        return {
            "snapshots": [snapshot.cpu() for snapshot in self._snapshots],
            "steps": list(self._steps),
            "rates": list(self._rates),
            "fresh": self._fresh,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the snapshots again."""
        self._snapshots.clear()
        self._snapshots.extend(state["snapshots"])
        self._steps, self._rates = list(state["steps"]), list(state["rates"])
        self._fresh = state["fresh"]

    def _take(self, step: int) -> None:
        # Frozen layers are read too: a stack of one shape, and they cost one small gather each.
        self._snapshots.append(self._sampler.sample_all().cpu())
        self._steps.append(step)
        self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
        self._fresh = True

    @torch.inference_mode()
    def _judge(self, view: View) -> Tensor:
        """The probability that each active layer may be frozen now, in the order of `view.active`."""
        signals_TLS = signals_of(
            torch.tensor(self._steps), torch.tensor(self._rates), view.total_steps, len(view.layers)
        )[-self._model.config.window :]
        active = list(view.active)
        windows_BWK = torch.stack(list(self._snapshots))[:, active].transpose(0, 1)
        probability_B: Tensor = self._model(windows_BWK, signals_TLS[:, active].transpose(0, 1)).sigmoid()
        return probability_B

    def _choose(self, view: View, probability_B: Tensor) -> set[int]:
        ready = {place for place, p in zip(view.active, probability_B.tolist(), strict=True) if p >= self.threshold}
        if not self.prefix:
            return ready
        front = 0
        while front in ready or front in view.frozen:
            front += 1
        return {place for place in ready if place < front}

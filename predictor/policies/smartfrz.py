"""SmartFRZ: an attention model predicts from the motion of each layer's weights whether the layer may freeze."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.freezing.learning_rates import innermost
from predictor.layers.layer import Layer
from predictor.model.config import CLOCK
from predictor.model.decision import Floats, largest_prefix, saved_by
from predictor.model.features import tokens
from predictor.model.file import PredictorFile, load_predictor
from predictor.model.history import LayerHistory
from predictor.model.sampling import LayerSampler
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import gradient_norms, gradients

SHIPPED = Path(__file__).parent.parent / "weights" / "smartfrz.safetensors"
_PATIENCE = 2
"""Snapshots without gradients after which they are taken to be cleared too early."""


class SmartFRZPolicy(FreezePolicy):
    """Freezes each layer that a trained predictor finds ready.

    At about 60 moments of a training, evenly spread, a few weights of each layer are recorded. From the last 10 of
    these snapshots the predictor computes the probability that the layer may be frozen now.

    Paper: SmartFRZ (Li et al., ICLR 2023, arXiv 2401.16720).
    Rule: at every snapshot, each active layer's last W snapshots of K sampled weights go through the attention model.
        The layer freezes when its probability reaches the threshold, and stays frozen. If the predictor has learned
        what freezing costs, as the shipped one has, a prefix needs a higher probability the less it saves
        (`predictor.model.decision`). The threshold is then that of a prefix that saves a whole step.
    Signal: the motion of the weights, their distance from the start, gradient times motion, learning rate, progress and
        depth (`predictor.model.history`).
    Differs: the paper's predictor sees raw weights alone, which in our measurements does not carry over to another
        architecture. Ours has learned what freezing a prefix did to the loss, the paper's how alike activations are.
        The paper weighs no FLOPs. `prefix` keeps the frozen set a prefix, where freezing saves most; that is an option
        of third parties. After a drop of the learning rate, from which a network gains most, ours waits until the whole
        window lies behind the drop. A snapshot at which nothing has moved is left out.
    Cost: one gather and one gradient norm a layer and one small batch through the predictor at each of about 60
        snapshots a run. With `prefix` and a predictor that knows what freezing costs also one forward pass, in which
        FLOPs are counted.

    Args:
        predictor: a file from `python -m predictor train`. By default the one that ships.
        threshold: the probability from which a layer freezes. By default the file's own.
        prefix: freeze a layer only together with all before it.
        votes: consecutive snapshots at which a layer must be found ready before it freezes.
        risk: the percentage points of accuracy that may be lost, in place of a threshold.
        front: the share of the layers, counted from the input, that freezes before the first step without a
            prediction. For pretrained networks, whose first layers are best frozen before training disturbs them.

    Raises:
        UsageError: for a value out of range, for a threshold together with a risk, and for a risk with a predictor that
            does not know what freezing costs. While training, when the gradients have been cleared before
            `controller.step()`.
    """

    refreezes = True

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
        if votes < 1:
            raise UsageError(f"votes={votes}: give a number of decisions, from 1")
        if not 0 <= front <= 1:
            raise UsageError(f"front={front}: give a share of the layers, from 0 to 1")
        self.threshold = _threshold(file, threshold, risk)
        self.prefix = prefix
        self.wants_flops = prefix and file.weighs  # to weigh them against doubt
        self.votes = votes
        self.front = front
        self._model = file.model
        self._spec = file.spec
        self._knows_costs = file.weighs
        self._history: LayerHistory | None = None  # made at the first decision
        self._loaded: dict[str, Any] = {}  # the state of a history that is not made yet
        self._votes: dict[int, int] = {}  # by active layer: consecutive decisions at which it was found ready
        self._lr: float | Tensor | None = None  # of the newest step, if there was one since the newest snapshot
        self._lr_hook: RemovableHandle | None = None

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Draw the positions of the sampled weights, and begin a new history."""
        self.close()
        self._optimizer = optimizer
        self._lr_hook = innermost(optimizer).register_step_post_hook(self._note_lr)
        self._sampler = LayerSampler(layers, self._spec)
        self._history = None
        self._loaded = {}
        self._votes = {}
        self._missed = 0  # consecutive snapshots without any gradient
        self._saved_L: Floats | None = None

    def due(self, step: int, total_steps: int) -> bool:
        """At every snapshot."""
        return self._spec.due(step, total_steps)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those that the predictor finds ready."""
        history = self._history = self._history or self._new_history(view)
        weights_LK = self._sampler.sample_all().cpu()  # of frozen layers too, so that all snapshots have one shape
        evidence = history.update(view.step, self._last_lr(), weights_LK, self._gradient_norms(view), view.frozen)
        if view.step == 0:
            return view.frozen | frozenset(range(round(self.front * len(view.layers))))
        if not evidence:
            return view.frozen
        self._check_gradients(view)
        if history.length == 1:  # the learning rate has dropped
            self._votes.clear()
        if not history.ready or not view.active:
            return view.frozen
        return view.frozen | self._choose(view, self._predict(view.active))

    def state_dict(self) -> dict[str, Any]:
        """The history of the layers, and the votes so far."""
        history = self._loaded if self._history is None else self._history.state_dict()
        return {**history, "votes": dict(self._votes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        history = {name: value for name, value in state.items() if name != "votes"}
        if self._history is None:
            self._loaded = history
        elif history:
            self._history.load_state_dict(history)
        self._votes = dict(state["votes"])

    def close(self) -> None:
        """Remove the hook from the optimizer."""
        if self._lr_hook is not None:
            self._lr_hook.remove()
        self._lr_hook = None

    def __getstate__(self) -> dict[str, Any]:
        # A hook's handle refers to all hooks of the optimizer, and some of those cannot be copied.
        return {**self.__dict__, "_lr_hook": None}

    def _new_history(self, view: View) -> LayerHistory:
        sizes = [layer.size for layer in view.layers]
        history = LayerHistory(sizes, view.total_steps, self._model.config.window, fade_frozen=self._knows_costs)
        if self._loaded:
            history.load_state_dict(self._loaded)
            self._loaded = {}
        return history

    def _note_lr(self, optimizer: Optimizer, *_: object) -> None:
        """Keep the rate of the step just taken: in some loops the schedule has gone on when `decide` is called."""
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # a tensor is overwritten, and reading it waits

    def _last_lr(self) -> float:
        lr = float(self._optimizer.param_groups[0]["lr"] if self._lr is None else self._lr)
        self._lr = None
        return lr

    @property
    def _uses_gradients(self) -> bool:
        return len(self._model.config.features) > len(CLOCK)

    def _gradient_norms(self, view: View) -> Tensor:
        if not self._uses_gradients or not view.active:
            return torch.full((len(view.layers),), torch.nan)
        return gradient_norms(view.layers).cpu()

    def _check_gradients(self, view: View) -> None:
        """Raise UsageError if weights move and no layer has a gradient, twice in a row.

        Once may be a batch that was left out, as Lightning allows it.
        """
        if not self._uses_gradients or any(gradients(view.layers[index]) for index in view.active):
            self._missed = 0
            return
        self._missed += 1
        if self._missed == _PATIENCE:
            # Otherwise it would look like a network in which nothing is left to learn.
            raise UsageError(
                f"no layer has a gradient at step {view.step}, nor had one at the snapshot before: call "
                "controller.step() after optimizer.step() and before optimizer.zero_grad()"
            )

    @torch.inference_mode()
    def _predict(self, active: Sequence[int]) -> Tensor:
        """The probability that each of these layers may be frozen now."""
        assert self._history is not None
        probability_B: Tensor = self._model(tokens(self._model.config, *self._history.windows(active))).sigmoid()
        return probability_B

    def _choose(self, view: View, probability_B: Tensor) -> set[int]:
        ready = self._ready(view, dict(zip(view.active, probability_B.tolist(), strict=True)))
        self._votes = {index: self._votes.get(index, 0) + 1 for index in ready}
        chosen = {index for index, votes in self._votes.items() if votes >= self.votes}
        if not self.prefix:
            return chosen
        size = 0
        while size in chosen or size in view.frozen:
            size += 1
        return {index for index in chosen if index < size}

    def _ready(self, view: View, probability: dict[int, float]) -> list[int]:
        """Which of the active layers are ready, by their probabilities."""
        if not self.wants_flops:
            return [index for index, p in probability.items() if p >= self.threshold]
        if self._saved_L is None:
            self._saved_L = _saved_by_prefixes(view)
        probability_L = [probability.get(index, 1.0) for index in range(len(view.layers))]
        size = largest_prefix(probability_L, self._saved_L, self.threshold)
        return [index for index in probability if index < size]


def _threshold(file: PredictorFile, threshold: float | None, risk: float | None) -> float:
    if threshold is not None and risk is not None:
        raise UsageError(f"threshold={threshold}, risk={risk}: give one of them; a risk stands for a threshold")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"threshold={threshold}: give a probability, from 0 to 1")
    if risk is not None:
        return file.threshold_for(risk)
    return file.threshold if threshold is None else threshold


def _saved_by_prefixes(view: View) -> Floats:
    """What each prefix saves. If FLOPs cannot be counted, every layer is taken to cost the same."""
    count = len(view.layers)
    if view.flops is None:
        return saved_by(np.linspace(1, 0, count + 1))
    return saved_by([view.flops.share(frozenset(range(size))) for size in range(count + 1)])

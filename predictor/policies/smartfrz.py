"""SmartFRZ: an attention model predicts from the motion of each layer's weights whether the layer may freeze."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.errors import UsageError
from predictor.freezing.learning_rates import innermost
from predictor.freezing.optimizers import optimizers_of
from predictor.layers.flops import LayerFlops
from predictor.layers.layer import Layer
from predictor.model.config import CLOCK
from predictor.model.decision import Floats, largest_prefix, saved_by
from predictor.model.features import tokens
from predictor.model.file import PredictorFile, load_predictor
from predictor.model.history import LayerHistory
from predictor.model.sampling import LayerSampler
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import gradient_norms_of, gradients, to_host
from predictor.policies.measuring.layer_rates import group_of_layers
from predictor.policies.measuring.learned import from_scratch, has_learned
from predictor.policies.measuring.unready import is_ready

SHIPPED = Path(__file__).parent.parent / "weights" / "smartfrz.safetensors"
_DEFAULT_RISK = 0.5
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
        Before the first step, where the training shows its first batches (`FreezeController.look`), a second model
        predicts from each prefix's share of the layers and of the gradient, and from the length of the training, what
        it would cost if it froze at once (`predictor.model.first_prefix`). The largest whose cost is allowed for the
        risk freezes. None does where the first layers have not learned or settled, nor in a training of fewer steps
        than any that it has learned from: where each step still counts, every frozen layer costs more. From scratch a
        third model says that of random layers, up to the first that is of no use so (`policies.measuring.unready`).
    Signal: the motion of the weights, their distance from the start, gradient times motion, learning rate, progress and
        depth (`predictor.model.history`).
    Differs: the paper's predictor sees raw weights alone, which in our measurements does not carry over to another
        architecture. Ours has learned what freezing a prefix did to the loss, the paper's how alike activations are.
        The paper weighs no FLOPs. `prefix` keeps the frozen set a prefix, where freezing saves most; that is an option
        of third parties. Ours predicts for a layer only from a window of steps in which it moved and had a gradient,
        and in which its learning rate has neither dropped, nor fallen far too early, nor risen again (`LayerHistory`).
        It waits for a first rise that the schedule names. A prefix passes over layers that the user holds still, and
        they join it until they are opened.
    Cost: one gather and one gradient norm a layer, two transfers from a GPU and one small batch through the predictor
        at each of about 60 snapshots a run. A look takes a quarter of each of 8 batches forward and backward. With
        `prefix` and a predictor that knows what freezing costs also one forward pass, in which FLOPs are counted.

    Args:
        predictor: a file from `python -m predictor train`. By default the one that ships.
        threshold: the probability from which a layer freezes. By default the file's own.
        prefix: freeze a layer only together with all before it.
        votes: consecutive snapshots at which a layer must be found ready before it freezes.
        risk: the percentage points of accuracy that may be lost, in place of a threshold.
        front: the share of the layers, counted from the input, that freezes before the first step without a
            prediction. By default the predictor chooses, where the training shows it its first batches
            (`FreezeController.look`).

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
        front: float | None = None,
    ) -> None:
        if predictor is None and not SHIPPED.exists():
            raise UsageError("smartfrz needs a predictor: give predictor=PATH, from `python -m predictor train`")
        file = load_predictor(SHIPPED if predictor is None else predictor)
        if votes < 1:
            raise UsageError(f"votes={votes}: give a number of decisions, from 1")
        if front is not None and not 0 <= front <= 1:
            raise UsageError(f"front={front}: give a share of the layers, from 0 to 1")
        self.threshold = _threshold(file, threshold, risk)
        self.prefix = prefix
        self.wants_flops = prefix and file.weighs  # to weigh them against doubt
        self.votes = votes
        self.front = front
        self._risk = _DEFAULT_RISK if risk is None else risk
        self._first_prefix = file.prefix if prefix and front is None and threshold is None else None
        self._model = file.model
        self._spec = file.spec
        self._knows_costs = file.weighs
        self._history: LayerHistory | None = None  # made at the first decision
        self._loaded: dict[str, Any] = {}  # the state of a history that is not made yet
        self._votes: dict[int, int] = {}  # by active layer: consecutive decisions at which it was found ready
        self._sampler: LayerSampler | None = None
        self._steps: Counter[int] = Counter()  # since the newest decision, by optimizer
        self._decided = 0  # the step of that decision
        self._rates: dict[int, list[Any]] = {}  # of the newest of them, by optimizer and parameter group
        self._lr_hooks: list[RemovableHandle] = []

    @property
    def wants_look(self) -> bool:  # type: ignore[override]  # weights may be loaded until it is asked
        """Whether it can say which prefix may freeze before the first step; not every predictor can from scratch."""
        model = self._first_prefix
        if model is None:
            return False
        if has_learned(self._layers):
            return True
        return model.scratch is not None and from_scratch(self._layers) and is_ready(self._network, self._layers[0])

    def worth_a_look(self, total_steps: int) -> bool:
        """Whether the training is as long as those that the prefix model has learned from."""
        model = self._first_prefix
        return model is not None and model.model_for(not has_learned(self._layers), total_steps) is not None

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Draw the positions of the sampled weights, and begin a new history."""
        self.close()
        self._network, self._layers = model, layers
        self._steps, self._decided, self._rates = Counter(), 0, {}
        self._optimizers = list(map(innermost, optimizers_of(optimizer)))
        self._started = [[_known(group.get("lr")) for group in each.param_groups] for each in self._optimizers]
        self._lr_hooks = [each.register_step_post_hook(self._note_rates) for each in self._optimizers]
        self._sampler = LayerSampler(layers, self._spec)
        self._history = None
        self._loaded = {}
        self._votes = {}
        self._missed = 0  # consecutive snapshots without any gradient
        self._saved_L: Floats | None = None
        self._weighed: LayerFlops | None = None  # what that was computed of

    def due(self, step: int, total_steps: int) -> bool:
        """At every snapshot."""
        return self._spec.due(step, total_steps)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those that the predictor finds ready."""
        if not self._take_snapshot(view):
            return view.frozen | frozenset(range(self._size_before_first_step(view) if view.step == 0 else 0))
        assert self._history is not None
        indices = self._history.with_window(view.active)
        if not indices:
            self._votes.clear()
            return view.frozen
        return view.frozen | self._choose(view, dict(zip(indices, self._predict(indices).tolist(), strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """The history of the layers, what is sampled of them, and the votes so far."""
        history = self._loaded if self._history is None else self._history.state_dict()
        sampled = {} if self._sampler is None else self._sampler.state_dict()
        return {**history, **sampled, "votes": dict(self._votes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        history = {name: value for name, value in state.items() if name not in ("votes", "sampled")}
        if self._history is None:
            self._loaded = history
        elif history:
            self._history.load_state_dict(history)
        self._votes = dict(state["votes"])
        if self._sampler is not None and "sampled" in state:  # not in one of an earlier version
            self._sampler.load_state_dict(state)

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._lr_hooks:
            hook.remove()
        self._lr_hooks = []

    def __getstate__(self) -> dict[str, Any]:
        # A hook's handle refers to all hooks of the optimizer, and some of those cannot be copied.
        return {**self.__dict__, "_lr_hooks": []}

    def _size_before_first_step(self, view: View) -> int:
        """How many layers freeze before the first step."""
        if self.front is not None:
            return round(self.front * len(view.layers))
        if self._first_prefix is None or view.look is None:
            return 0
        return self._first_prefix.choose(view.look, view.total_steps, self._risk)

    def _take_snapshot(self, view: View) -> bool:
        """Add a snapshot to the history, and say whether it is evidence."""
        sampler = self._sampler
        assert sampler is not None
        history = self._history = self._history or self._new_history(view, sampler)
        opened = sampler.follow()
        # Of frozen layers too, so that all snapshots have one shape.
        weights_LK = to_host([sampler.sample(index) for index in range(len(view.layers))])
        if opened:
            history.restart(opened, weights_LK, sampler.sizes_L)
        skipped = max(self._steps.values(), default=0) < view.step - self._decided
        self._steps, self._decided = Counter(), view.step
        norm_L, lr_L = self._read_norms_and_rates(view)
        evidence = history.update(view.step, lr_L, weights_LK, norm_L, view.frozen, view.resting)
        history.wait_for_rise(self._named_rates())
        if evidence and view.step > 0:
            self._check_gradients(view, skipped)
        return evidence and view.step > 0

    def _new_history(self, view: View, sampler: LayerSampler) -> LayerHistory:
        window, sizes_L = self._model.config.window, sampler.sizes_L
        history = LayerHistory(sizes_L, view.total_steps, window, self._knows_costs, self._uses_gradients)
        if self._loaded:
            history.load_state_dict(self._loaded)
            self._loaded = {}
        return history

    def _note_rates(self, optimizer: Optimizer, *_: object) -> None:
        """Keep the rates of the step just taken: in some loops the schedule has gone on when `decide` is called."""
        self._steps[id(optimizer)] += 1
        rates = [group.get("lr") for group in optimizer.param_groups]
        # A tensor is overwritten, and reading it waits for the device.
        self._rates[id(optimizer)] = [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]

    def _read_norms_and_rates(self, view: View) -> tuple[Tensor, list[float]]:
        """norm_L of the gradients, and lr_L: with one synchronization, rates on the device included."""
        groups, rates = [], []
        for optimizer in self._optimizers:
            noted = self._rates.get(id(optimizer)) or [group.get("lr") for group in optimizer.param_groups]
            rates += noted
            groups += optimizer.param_groups[: len(noted)]  # others have been added since
        self._rates = {}
        norms = gradient_norms_of(view.layers) if self._uses_gradients and view.active else []
        rates = [float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr for lr in rates]
        on_device = [lr.detach().float().reshape(()) for lr in rates if isinstance(lr, Tensor)]
        read = to_host([*norms, *on_device]) if norms or on_device else torch.empty(0, device="cpu")
        norm_L = read[: len(norms)] if norms else torch.full((len(view.layers),), torch.nan, device="cpu")
        tensors = iter(read[len(norms) :].tolist())
        lr_G = [_rate(next(tensors) if isinstance(lr, Tensor) else lr) for lr in rates]
        if len(set(lr_G)) == 1:
            return norm_L, lr_G[:1] * len(view.layers)
        group_L = group_of_layers(self._layers, groups)
        return norm_L, [max(lr_G) if group is None else lr_G[group] for group in group_L]

    def _named_rates(self) -> list[float]:
        """lr_L: the highest rate that the optimizer was made with or its schedule names, as far as it is known."""
        groups, named_G = [], []
        for optimizer, started in zip(self._optimizers, self._started, strict=True):
            groups += optimizer.param_groups
            named = (max(_known(each.get("initial_lr")), _known(each.get("max_lr"))) for each in optimizer.param_groups)
            named_G += [max(pair) for pair in zip_longest(named, started, fillvalue=0.0)]
        return [0.0 if group is None else named_G[group] for group in group_of_layers(self._layers, groups)]

    @property
    def _uses_gradients(self) -> bool:
        return len(self._model.config.features) > len(CLOCK)

    def _check_gradients(self, view: View, skipped: bool) -> None:
        """Raise UsageError if weights move and no layer has a gradient, twice in a row.

        Not where steps were skipped since the snapshot before: the newest may be one of them, and has none by right.
        """
        if not self._uses_gradients or any(gradients(view.layers[index]) for index in view.active):
            self._missed = 0
            return
        self._missed += not skipped
        if self._missed == _PATIENCE:
            # Otherwise it would look like a network in which nothing is left to learn.
            raise UsageError(
                f"no layer has a gradient at step {view.step}, nor had one at the snapshot before: call "
                "controller.step() after optimizer.step() and before optimizer.zero_grad()"
            )

    @torch.inference_mode()
    def _predict(self, indices: Sequence[int]) -> Tensor:
        """The probability that each of these layers may be frozen now."""
        assert self._history is not None
        probability_B: Tensor = self._model(tokens(self._model.config, *self._history.windows(indices))).sigmoid()
        return probability_B

    def _choose(self, view: View, probability: dict[int, float]) -> set[int]:
        """The layers to freeze now, by the probabilities of those that have a window."""
        passed = set() if self._history is None else self._history.at_rest(view.active)
        ready = self._ready(view, probability, passed)
        self._votes = {index: self._votes.get(index, 0) + 1 for index in ready}
        chosen = {index for index, votes in self._votes.items() if votes >= self.votes}
        if not self.prefix:
            return chosen
        size = 0
        while size in chosen or size in view.frozen or size in passed:
            size += 1
        chosen = {index for index in chosen if index < size}
        # What the user holds still in front of them joins them: the prefix ends the backward pass, and can be cached.
        return chosen | {index for index in passed & view.resting if index < max(chosen, default=0)}

    def _ready(self, view: View, probability: dict[int, float], passed: set[int]) -> list[int]:
        """Which of the layers that have a window are ready."""
        if not self.wants_flops:
            return [index for index, p in probability.items() if p >= self.threshold]
        # FLOPs are counted anew where the user opens what was held still.
        if self._saved_L is None or view.flops not in (None, self._weighed):
            self._saved_L, self._weighed = _saved_by_prefixes(view), view.flops
        certain = view.frozen | passed
        probability_L = [probability.get(index, float(index in certain)) for index in range(len(view.layers))]
        size = largest_prefix(probability_L, self._saved_L, self.threshold)
        return [index for index in probability if index < size]


def _rate(lr: Any) -> float:
    """A learning rate. An optimizer that finds its own, as Adafactor, may have None: then it is taken for constant."""
    return float(lr) if isinstance(lr, int | float) and math.isfinite(lr) else 1.0


def _known(lr: Any) -> float:
    """A rate that is read without waiting for a device; 0 where there is none."""
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    return float(lr) if isinstance(lr, int | float) and math.isfinite(lr) else 0.0


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

"""When a policy is asked, and how its answer is carried out. The controller acts; it never judges."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent
from predictor.freezing.freeze import freeze, is_frozen, settle_containers, thaw, warn_of_left
from predictor.freezing.learning_rates import LayerRates
from predictor.freezing.messages import Teller
from predictor.freezing.wrappers import GradientWatch, follow, forget_compiled, refuse_unfit
from predictor.layers.layer import Layer, layers_of
from predictor.layers.parts import unwrapped
from predictor.policies.base import FreezePolicy, View

_FAR = 1000
"""Steps to look ahead for the next decision."""


class FreezeController:
    """Freezes a model's layers while it trains.

        controller = FreezeController(model, optimizer, make_policy("smartfrz"), total_steps=steps)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()

    A policy that freezes before the first step does so here, in the constructor. Warns of layers that an earlier
    controller left frozen, which stay so: `release` them before the optimizer is made.

    To resume: make model, optimizer (over all parameters) and controller as at the start, then load the state of each.

    model: any module, as it is called in the loop: inside DDP or `torch.compile` too, which then keep up with what is
    frozen. optimizer: one, or several, over all parameters. total_steps: optimizer steps of the whole training. layers:
    those that may freeze, front to back; by default `layers_of(model)`. agree: where several processes train one model,
    makes one process's answer that of all, given the answer and the number of layers; by default that of the first
    process where `model` is DDP or sharded. say: takes one line at each freeze, with what froze and what a step costs
    before and after, and one where data loading has become the bound; None for silence. The cost is counted once, in a
    pass forward of its own; with silence, and no policy that asks for it, there is none.

    Raises UsageError when total_steps is below 1, when a layer's parameter belongs to no optimizer, when the policy
    names a layer that does not exist, when what is around the model cannot freeze layers while it trains (DeepSpeed,
    FSDP1, DDP with a static graph, reentrant checkpointing), and when gradients no longer reach a layer that trains.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        policy: FreezePolicy,
        *,
        total_steps: int,
        layers: Sequence[Layer] | None = None,
        agree: Callable[[frozenset[int], int], frozenset[int]] | None = None,
        say: Callable[[str], None] | None = print,
    ) -> None:
        if total_steps < 1:
            raise UsageError(f"total_steps={total_steps}: give the number of optimizer steps of the whole training")
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        refuse_unfit(model, self._optimizers)
        self.model = unwrapped(model)
        """The model itself, without what is wrapped around it."""
        self.policy = policy
        self.layers = tuple(layers_of(model) if layers is None else layers)
        self.total_steps = total_steps
        self.history: list[FreezeEvent] = []
        self.seconds = 0.0
        """Wall-clock seconds spent in here so far, decisions included."""
        self.agree: Callable[[frozenset[int], int], frozenset[int]] = _as_it_is
        self._frozen: frozenset[int] = frozenset()
        warn_of_left(self.layers)
        self._still = {id(p) for layer in self.layers for p in layer.parameters() if not p.requires_grad}  # the user's
        self._step = 0
        self._listeners: list[Callable[[FreezeEvent], None]] = [forget_compiled]
        self._moved: list[Callable[[], None]] = []
        self._watch = GradientWatch(self.layers, self._optimizers)
        self._teller = Teller(model, self.layers, say, whole=layers is None)
        self._reset_seen = self._overran = False
        self._observing = type(policy).observe is not FreezePolicy.observe
        self._wake = 0
        self._check_optimizers()
        follow(self, model)
        self.agree = agree or self.agree
        if policy.wants_flops:
            self._teller.count()
        policy.bind(self.model, self._optimizers[0], self.layers)
        self._rates: LayerRates | None = None
        if type(policy).rates is not FreezePolicy.rates:  # otherwise not even a hook
            self._rates = LayerRates(self.layers, self._optimizers, lambda: policy.rates(self.view), self._timed)
        self._timed(self._decide)

    @property
    def frozen(self) -> frozenset[int]:
        """Places in `layers` of those frozen now."""
        return self._frozen

    @property
    def finished(self) -> bool:
        """Whether all layers have become frozen, for good: a training may end here, with only the head still training.

        Never under a policy that thaws, and not where all were frozen before the first step, as for a linear probe.
        With `layers` that are a part of the model it is about these: the others still train.
        """
        whole = 0 < len(self.layers) == len(self._frozen) and not self.policy.thaws
        return whole and bool(self.history) and self.history[-1].step > 0

    @property
    def view(self) -> View:
        """What the policy may look at now."""
        return View(self.layers, self._frozen, self._step, self.total_steps, self._teller.flops)

    def step(self) -> FreezeEvent | None:
        """Call after `optimizer.step()` and before `zero_grad()`. Returns what changed, if anything did."""
        self._step += 1
        # Most steps of most trainings end here, and have to: with a fast network, Python's time counts.
        if self._step < self._wake:
            return None
        return self._timed(self._advance)

    def on_change(self, callback: Callable[[FreezeEvent], None]) -> None:
        """Call `callback` after each change, also after one that comes from loading a state."""
        self._listeners.append(callback)

    def on_moved(self, callback: Callable[[], None]) -> None:
        """Call `callback` where somebody else had switched frozen layers on, which may have moved."""
        self._moved.append(callback)

    def hide_argument(self, name: str) -> None:
        """Say that calls of the model have a keyword argument that a hook takes out before its own `forward`."""
        self._teller.hidden.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Step, frozen layers, history and the policy's state: numbers, strings, tensors, lists and dicts of them."""
        return {
            "step": self._step,
            "total_steps": self.total_steps,
            "layers": [layer.name for layer in self.layers],
            "frozen": sorted(self._frozen),
            "history": [event.as_dict() for event in self.history],
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result; freezes and thaws layers to match. In any order with the optimizer's.

        Raises UsageError when the state is of a model with other layers or of a training of another length.
        """
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            odd = next((pair for pair in zip(state["layers"], names, strict=False) if pair[0] != pair[1]), None)
            raise UsageError(
                f"this state is of a model with {len(state['layers'])} layers, here are {len(names)}"
                + (f"; the first that differs: {odd[0]!r} there, {odd[1]!r} here" if odd else "")
            )
        if state["total_steps"] != self.total_steps:
            raise UsageError(
                f"this state is of a training of {state['total_steps']} steps, and total_steps={self.total_steps}: "
                "make the controller with the former, or begin anew: what froze was right for that length"
            )
        self._step = state["step"]
        self._wake = 0
        self.history = [FreezeEvent.from_dict(event) for event in state["history"]]
        if self._frozen != frozenset(state["frozen"]):
            self._change(frozenset(state["frozen"]))
        self.policy.load_state_dict(state["policy"])

    def close(self) -> None:
        """Take the hooks off the model and let go of what the policy holds. Layers stay as they are."""
        self._teller.close()
        if self._rates is not None:
            self._rates.close()
        self.policy.close()

    def release(self) -> None:
        """Let the frozen layers train again, after the last step; what stood still before the controller came stays so.

        What is wrapped around the model, a cache and whoever listens are told. Take states, the cache's too, before.
        """
        if self._frozen:
            self._change(frozenset())

    def _advance(self) -> FreezeEvent | None:
        self._teller.stepped()
        if self._step > self.total_steps and not self._overran:
            self._overran = True
            warnings.warn(
                f"this is step {self._step}, and total_steps={self.total_steps}: layers have frozen too early for a "
                "training that goes on. Give the optimizer steps of all epochs: len(loader) * epochs // accumulation",
                stacklevel=4,
            )
        self._hold()
        view = self.view
        if self._watch.watching:
            self._watch.check(view.active)
        self.policy.observe(view)
        event = self._decide() if self.policy.due(self._step, self.total_steps) else None
        self._wake = self._step + 1 if self._busy else self._next_due()
        return event

    @property
    def _busy(self) -> bool:
        """Whether there is something to do at each step, besides deciding where that is due."""
        return bool(self._observing or self._watch.watching or self._teller.busy or self._frozen)

    def _next_due(self) -> int:
        """The next step at which a decision is due, or one before that where it is far off."""
        step, far = self._step + 1, self._step + _FAR
        if step <= self.total_steps:
            far = min(far, self.total_steps + 1)
        while step < far and not self.policy.due(step, self.total_steps):
            step += 1
        return step

    def _decide(self) -> FreezeEvent | None:
        wanted = frozenset(self.policy.decide(self.view))
        outside = sorted(place for place in wanted if not 0 <= place < len(self.layers))
        if outside:
            raise UsageError(
                f"{type(self.policy).__name__} wants to freeze layer {outside[0]} of {len(self.layers)}: "
                "places run from 0 to one less"
            )
        wanted = self.agree(wanted, len(self.layers))
        if wanted == self._frozen:
            return None
        return self._change(wanted, note=True)

    def _change(self, wanted: frozenset[int], note: bool = False) -> FreezeEvent:
        event = FreezeEvent(
            self._step,
            tuple(sorted(wanted - self._frozen)),
            tuple(sorted(self._frozen - wanted)),
            tuple(sorted(wanted)),
            len(self.layers),
        )
        before = self._frozen
        self._apply(wanted)
        self._watch.start(self.view.active)
        if note:
            self.history.append(event)
            self._teller.changed(event, before, self.finished)
        for listener in self._listeners:
            listener(event)
        return event

    def _apply(self, wanted: frozenset[int]) -> None:
        # Before the first step an optimizer's state can only be one that was loaded to resume, and what the policy
        # froze so early may be thawed by the controller's own state, which is loaded next.
        optimizers = self._optimizers if self._step else ()
        for place in sorted(wanted - self._frozen):
            freeze(self.layers[place], optimizers)
        thaw([self.layers[place] for place in sorted(self._frozen - wanted)], self.model, self._still)
        settle_containers(self.model, self.layers, wanted)
        self._frozen = wanted

    def _hold(self) -> None:
        """Freeze again what the user's code has switched back on, tell who keeps its outputs, and say so once."""
        moved = [place for place in sorted(self._frozen) if _stirred(self.layers[place])]
        if not moved:
            return
        for place in moved:
            freeze(self.layers[place], self._optimizers)
        if not self._reset_seen:
            self._reset_seen = True
            warnings.warn(
                f"something switched frozen layer {moved[0]} ({self.layers[moved[0]].name}) back on, and it may have "
                "moved; it is frozen again. Look for requires_grad_(True) in the training loop",
                stacklevel=4,
            )
        for callback in self._moved:
            callback()

    def _check_optimizers(self) -> None:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            if not is_frozen(layer) and any(p.requires_grad and id(p) not in held for p in layer.parameters()):
                raise UsageError(
                    f"layer {layer.name!r} has parameters that no optimizer holds: make the optimizer over all of "
                    "model.parameters(), before anything is frozen"
                )

    def _timed(self, action: Callable[[], FreezeEvent | None]) -> FreezeEvent | None:
        start = time.perf_counter()
        try:
            return action()
        finally:
            self.seconds += time.perf_counter() - start


def _stirred(layer: Layer) -> bool:
    """Whether a frozen layer could move, or has."""
    return any(parameter.requires_grad or parameter.grad is not None for parameter in layer.parameters())


def _as_it_is(wanted: frozenset[int], layers: int) -> frozenset[int]:
    return wanted

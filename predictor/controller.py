"""When a policy is asked, and how its answer is carried out. The controller acts; it decides nothing."""

import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.freezing.compiled import CompiledCode
from predictor.freezing.event import FreezeEvent
from predictor.freezing.freeze import is_at_rest, warn_of_leftover_freezing
from predictor.freezing.learning_rates import LayerRates
from predictor.freezing.messages import FreezeReporter
from predictor.freezing.optimizers import as_optimizers, joint
from predictor.freezing.timeline import Timeline
from predictor.freezing.upkeep import Upkeep
from predictor.freezing.wrappers import GradientWatch, follow, refuse_unfit, without_sync
from predictor.layers.first_pass import FirstPass
from predictor.layers.isolated_pass import shown
from predictor.layers.layer import Layer, first_layers
from predictor.layers.members import may_be_of, members_of, refuse_other_layers, stored_layers
from predictor.layers.parts import unwrapped
from predictor.model.first_look import FirstLook
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.first_look import look_at
from predictor.policies.measuring.first_statistics import FirstStatistics

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


class FreezeController:
    """Freezes a model's layers while it trains.

        controller = FreezeController(model, optimizer, make_policy("smartfrz"), total_steps=steps)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()

    A policy that freezes before the first step does so here, in the constructor, or in `look`. Layers that an earlier
    controller left frozen stay frozen, with a warning: call its `release` before the optimizer is made.

    To resume, make model, optimizer (over all parameters) and controller as at the start, then load the state of each.

    **Cost of a step.** A step in which nothing is due costs one comparison, before the first freeze and after it.

    **What your code switches back on.** A `requires_grad_(True)` on a frozen layer does nothing until a gradient
    arrives. Where the layer trained until it froze, that gradient is dropped in the backward pass, so that no optimizer
    moves the layer, with one warning; the next `step` freezes the layer again and calls the callbacks of `on_moved`.
    A `.grad` that is set by hand in each step, as zeros for missing gradients, is dropped before the optimizer's step,
    with one warning. Where that begins only later it is noticed within a twentieth of the training and 100 steps; the
    layer may have moved by then. To train frozen layers again, call `release`.

    **What your code holds still** is yours. A layer in which nothing requires a gradient is at rest. If a policy
    freezes it all the same and you open it later, it trains at once, the controller unfreezes it, and a policy by the
    clock does not freeze it again.

    Args:
        model: any module, as the loop calls it. Inside DDP or `torch.compile` it is followed there.
        optimizer: one or several, over all parameters.
        policy: what decides, from `make_policy` or a subclass of `FreezePolicy`.
        total_steps: optimizer steps of the whole training.
        layers: those that may freeze, front to back. By default `layers_of(model)`; where that does not run the model,
            its first pass shows them, and until then they are in the order of definition.
        agree: makes one process's answer that of all, given the answer and the number of layers. By default the first
            process decides where `model` is DDP or sharded.
        say: takes one line at each freeze, with what froze and what a step costs before and after, and one line where
            steps wait longer for their inputs than they compute. None for silence. The cost is counted once, in a
            forward pass of its own, and not at all under silence unless the policy needs it or in a dry run.
        dry_run: ask the policy and report what it would freeze, and change nothing. `history` holds what would have
            happened; `frozen` stays empty. The policy sees a training in which all layers train on. After the last
            step, or at `close`, a summary says what would have frozen when, and which FLOPs that saves.

    Raises:
        UsageError: total_steps is below 1; no optimizer holds a layer's parameter; the policy names a layer that does
            not exist; something around the model cannot freeze layers while it trains (DeepSpeed, FSDP1, DDP with a
            static graph, reentrant checkpointing); or gradients no longer reach a layer that trains.
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
        dry_run: bool = False,
    ) -> None:
        total_steps = _whole(total_steps)
        self._optimizers = as_optimizers(optimizer)
        refuse_unfit(model, self._optimizers)
        self.model = unwrapped(model)
        """The model itself, without what is wrapped around it."""
        self.called_model = model
        """The model as the loop calls it."""
        self.policy = policy
        self.layers, seen = first_layers(model, self._optimizers) if layers is None else (tuple(layers), True)
        self._layers_given = layers is not None
        self.total_steps = total_steps
        self.dry_run = dry_run
        self.history: list[FreezeEvent] = []
        self.seconds = 0.0
        """Wall-clock seconds spent in here so far, decisions included. On a GPU a decision waits for the steps that are
        queued; that wait counts too, though those steps had to be computed anyway."""
        self.looked = 0.0
        """Batches that `look` has taken, a part of one as that part. Each costs a forward and a backward pass."""
        self._looks = 0  # losses that it has taken
        self._look: FirstLook | None = None
        self._looking = False
        self._statistics: FirstStatistics | None = None  # what the look has written to BatchNorms
        self.agree: Callable[[frozenset[int], int], frozenset[int]] = _own_answer
        self._planned: frozenset[int] = frozenset()  # what the policy wants frozen; frozen unless in a dry run
        warn_of_leftover_freezing(self.layers)
        self._step = 0
        self._next_wake = 0
        self._upkeep = Upkeep(self.model, self._optimizers, self.layers, total_steps, self._wake)
        self._compiled = CompiledCode(model, total_steps)
        self._listeners: list[Callable[[FreezeEvent], None]] = [self._compiled.forget]
        self._watch = GradientWatch(self.layers, self._optimizers)
        self._reporter = FreezeReporter(model, self.layers, say, whole=layers is None, dry_run=dry_run)
        self._warned_of_overrun = self._summarized = False
        self._waiting_state: dict[str, Any] | None = None  # one that was loaded before the layers were known
        self._first_pass: FirstPass | None = None
        if not seen:
            self._first_pass = FirstPass(model, self._optimizers, self._settle_layers, self._reporter.hidden)
        self._observing = type(policy).observe is not FreezePolicy.observe
        self._check_optimizers()
        follow(self, model)
        self.agree = agree or self.agree
        if policy.wants_flops or dry_run:
            self._reporter.count()
        self._rates: LayerRates | None = None
        self._bind()
        self._timed(self._decide)
        if self._first_pass is not None:
            self._first_pass.watch()

    @property
    def frozen(self) -> frozenset[int]:
        """Indices in `layers` of those frozen now."""
        return frozenset() if self.dry_run else self._planned

    @property
    def finished(self) -> bool:
        """Whether all layers are frozen for good. A training may end here, since only the head still trains.

        Never under a policy that unfreezes, nor while the user holds a whole layer still, which he may open later, and
        not where all were frozen before the first step, as for a linear probe.
        With `layers` that are a part of the model it is about these; the others still train.
        """
        all_frozen = 0 < len(self.layers) == len(self.frozen) and not self.policy.unfreezes
        return all_frozen and bool(self.history) and self.history[-1].step > 0 and not self._upkeep.whole_layer_rests

    @property
    def view(self) -> View:
        """What the policy may look at now."""
        resting = (index for index, layer in enumerate(self.layers) if index not in self._planned and is_at_rest(layer))
        flops = self._reporter.flops
        look = self._look if self._step == 0 else None
        return View(self.layers, self._planned, self._step, self.total_steps, flops, frozenset(resting), look)

    @property
    def timeline(self) -> Timeline:
        """Which layer froze when, and which FLOPs that saved; in a dry run, what would have."""
        names = tuple(layer.name for layer in self.layers)
        return Timeline(names, tuple(self.history), self._step, self.total_steps, self._reporter.flops, self.dry_run)

    def plot(self, path: "str | Path | None" = None) -> "Figure":
        """Draw the `timeline` with matplotlib, and write the picture to a path if one is given.

        FLOPs are in it where they were counted: see `say`.
        """
        return self.timeline.plot(path)

    def look(
        self, batches: Iterable[Any], loss: Callable[[Any], Tensor], *, _others: Sequence[object] = ()
    ) -> FreezeEvent | None:
        """Have the policy decide before the first step by the gradients of the first batches, if it `wants_look`.

            controller.look(loader, lambda batch: loss_fn(model(batch[0]), batch[1]))

        Call it before the loop, after states were loaded. It takes a quarter of the samples of each of 8 batches, at
        least 4, forward and backward, in evaluation mode. Afterwards model, `.grad`, statistics, modes, the random
        generators of Python, NumPy and torch, the loader's own, and what `loss` uses are what they were. For that time
        it keeps two more copies of all weights that train. A BatchNorm that has seen no data yet normalises by the
        batch; if its layer freezes, it keeps the statistics of these batches.

        Batches stay whole whose samples cannot be told (tensors and lists of different lengths), and all of them where
        `loss` raises an error on a part. Under several processes each looks at its own, and the first decides.

        Args:
            batches: the training's DataLoader, or other batches. It is opened in here; an iterator that is open already
                loses what is taken.
            loss: from a batch, or a part of one, to its loss: one number with its graph, not scaled.

        Returns:
            What froze. None where nothing did: also, with one line, where there is no look, since there are fewer than
            two batches, gradients are not finite or weights are sharded. The batches are not opened where the policy
            wants no look, and in a training that has begun or is continued.

        Raises:
            UsageError: `loss` is no function, or what it returns is not a single number with a graph.
        """
        if not callable(loss):
            raise UsageError(
                f"look() was given a {type(loss).__name__} for the loss: give a function from a batch to its loss, "
                "lambda batch: loss_fn(model(batch[0]), batch[1])"
            )
        if not self.wants_look:
            return None
        return self._timed(lambda: self._start_with_look(batches, loss, _others))

    @property
    def wants_look(self) -> bool:
        """Whether `look` looks: the policy wants it, it could change something, and the training has not begun."""
        resumed = self._waiting_state is not None and self._waiting_state["step"]
        asked = self.policy.worth_a_look(self.total_steps) and self.policy.wants_look
        return bool(asked and not self._step and not resumed)

    def step(self) -> FreezeEvent | None:
        """Call after `optimizer.step()` and before `zero_grad()`. Returns what changed, if anything did."""
        self._step += 1
        # Most steps of most trainings end here, and have to: with a fast network, Python's time counts.
        if self._step < self._next_wake:
            return None
        return self._timed(self._advance)

    def on_change(self, callback: Callable[[FreezeEvent], None]) -> None:
        """Call `callback` after each change, also after one that comes from loading a state.

        A CUDA graph of your own has to be captured again here: it replays the backward pass of the frozen set before.
        """
        self._listeners.append(callback)

    def on_moved(self, callback: Callable[[], None]) -> None:
        """Call `callback` where the user's code had switched frozen layers back on, so that they may have moved."""
        self._upkeep.moved.append(callback)

    def report_no_look(self, reason: str) -> None:
        """Say in one line why there is no look at the first batches."""
        self._reporter.say_at_once(f"no look at the first batches: {reason}")

    def hide_argument(self, name: str) -> None:
        """Declare a keyword argument of the model's calls that a hook removes before the model's own `forward`."""
        self._reporter.hidden.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Step, frozen layers, history and the policy's state: numbers, strings, tensors, lists and dicts of them."""
        if self._waiting_state is not None:
            return self._waiting_state
        return {
            "step": self._step,
            "total_steps": self.total_steps,
            "layers": [layer.name for layer in self.layers],
            "members": members_of(self.model, self.layers),
            "frozen": sorted(self._planned),
            "history": [event.as_dict() for event in self.history],
            "policy": self.policy.state_dict(),
            "costs": self._reporter.state_dict(),
            "compiled": self._compiled.state_dict(),
            **({} if self.dry_run else {"held_still": self._upkeep.held_still}),
            **({"given_back": sorted(self._upkeep.given_back)} if self._upkeep.given_back else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`: freeze and unfreeze layers to match. In any order with the optimizer's.

        Only `set_state_dict` and `set_optimizer_state_dict` of torch.distributed.checkpoint have to come after it: they
        want optimizer state of all that requires a gradient, and frozen layers have none.

        Raises:
            UsageError: the state is of other layers, by their names or parameters, or of a training of another length.
        """
        if state["total_steps"] != self.total_steps:
            raise UsageError(
                f"this state is of a training of {state['total_steps']} steps, and total_steps={self.total_steps}: "
                "make the controller with the former, or start a new training: what froze was right for that length"
            )
        self._waiting_state = None
        watching = self._first_pass is not None and self._first_pass.watching
        # A state of before the first step may be of layers that no pass had shown.
        says_more = not self._layers_given and (state["step"] or watching)
        layers = stored_layers(self.model, state) if says_more else None
        if layers is None and watching and may_be_of(self.model, state["layers"]):
            self._waiting_state = state  # of the layers that the first pass will show
            return
        if layers is not None:
            self._settle_layers(layers)
        self._go_on_from(state)

    def _go_on_from(self, state: dict[str, Any]) -> None:
        """Go on from a state of the layers that there are. Raises UsageError for one of others."""
        refuse_other_layers(self.model, self.layers, state)
        if self._first_pass is not None and state["step"]:
            self._first_pass.close()  # a training goes on with the layers that it has
            self._first_pass = None
        self._step = state["step"]
        self._next_wake = 0
        self._upkeep.given_back = set(state.get("given_back", ()))
        self._reporter.load_state_dict(state.get("costs", {}))
        self._compiled.load_state_dict(state.get("compiled", {}))
        self.history = [FreezeEvent.from_dict(event) for event in state["history"]]
        frozen, held_still = frozenset(state["frozen"]), state.get("held_still")
        if held_still is not None and not self.dry_run:
            if self._planned and held_still != self._upkeep.held_still:
                self._change(frozenset())
            self._upkeep.hold_still(frozen - self._planned, set(held_still))
        if self._planned != frozen:
            self._change(frozen)
        self.policy.load_state_dict(state["policy"])

    def close(self) -> None:
        """Remove all hooks and drop what the policy holds. Layers stay as they are."""
        self._summarize()
        if self._first_pass is not None:
            self._first_pass.close()
        self._reporter.close()
        self._upkeep.close()
        self._watch.close()
        if self._rates is not None:
            self._rates.close()
        self.policy.close()

    def release(self) -> None:
        """Let the frozen layers train again: what trained when they froze. All else stays.

        Call it after the last step, or in mid-training: then these layers are as those that the user has opened, and no
        policy by the clock freezes them again. What is wrapped around the model, a cache and all listeners are
        informed. Take states, the cache's too, before.
        """
        if self._planned:
            self._upkeep.given_back |= self.frozen
            self._change(frozenset())

    def _bind(self) -> None:
        policy = self.policy
        policy.bind(self.model, joint(self._optimizers, self.layers), self.layers)
        if type(policy).rates is not FreezePolicy.rates and not self.dry_run:  # otherwise not even a hook
            self._rates = LayerRates(self.layers, self._optimizers, self._rate_factors, self._timed)

    def _rate_factors(self) -> dict[int, float]:
        # The policy's own time of a layer that the user has opened is over: its rate there would be zero.
        rates = self.policy.rates(self.view)
        return {index: factor for index, factor in rates.items() if index not in self._upkeep.given_back}

    def _start_with_look(
        self, batches: Iterable[Any], loss: Callable[[Any], Tensor], others: Sequence[object]
    ) -> FreezeEvent | None:
        """Begin the training anew, with a look at its first batches."""
        self._undo_start()
        self._looking = True
        model, why_not = self.called_model, self.report_no_look
        statistics = self._statistics = FirstStatistics(model)
        try:
            with without_sync(model):
                self._look = look_at(
                    model,
                    lambda: self.layers,
                    batches,
                    loss,
                    others=others,
                    around=self._taking,
                    why_not=why_not,
                    statistics=statistics,
                )
        finally:
            self._looking = False
            state = self._waiting_state
            if state is not None and state["layers"] == [layer.name for layer in self.layers]:
                self._waiting_state = None  # it has no more to say than that its training had not begun
            event = self._start()
        statistics.write(self.layers[index] for index in self.frozen)
        return event

    @contextmanager
    def _taking(self, share: float) -> Iterator[None]:
        """Around a pass of the look. The first ones show the layers and what they cost, as the training's own would."""
        # The second, since FLOPs are counted anew where the first has shown other layers.
        with shown() if self._looks < 2 else nullcontext():
            yield
        if self._looks == 0 and self._first_pass is not None:
            self._first_pass.settle()
        self._looks += 1
        self.looked += share

    def _undo_start(self) -> None:
        """Undo what was decided before the first step."""
        if self._planned:
            self._change(frozenset())
        if self._statistics is not None:
            self._statistics.take_back()
            self._statistics = None
        self.history.clear()
        self._reporter.withdraw()
        self._compiled.begin_anew()
        self._look = None
        self.policy.close()
        if self._rates is not None:
            self._rates.close()
            self._rates = None

    def _start(self) -> FreezeEvent | None:
        """Have the policy begin with the layers that there are, and decide as before the first step."""
        self._bind()
        step, self._step = self._step, 0
        event = self._decide()
        self._step, self._next_wake = step, 0
        return event

    def _settle_layers(self, layers: tuple[Layer, ...]) -> None:
        """Take the layers that the first pass has shown, where they are others, and begin anew with them."""
        if _described(layers) != _described(self.layers):
            if not self._looking:
                self._undo_start()
            self.layers = self._upkeep.layers = layers
            self._watch = GradientWatch(layers, self._optimizers)
            self._reporter.use(layers)
            if not self._looking:
                self._timed(self._start)
        if self._looking:
            return  # what is frozen now would not outlast the pass that looks
        state = self._waiting_state
        if state is not None and state["layers"] == [layer.name for layer in layers]:
            self._waiting_state = None
            self._go_on_from(state)

    def _end_first_pass(self) -> None:
        """Take what the first step has shown of the layers. Raises UsageError for a state that is of other layers."""
        assert self._first_pass is not None, "it has just been looked for"
        waiting, first_pass = self._waiting_state, self._first_pass
        first_pass.finish()
        self._first_pass = None
        if self._waiting_state is not None:
            self._waiting_state = None
            self._go_on_from(waiting or {})
        if waiting is not None:
            self._step = waiting["step"] + 1

    def _advance(self) -> FreezeEvent | None:
        if self._first_pass is not None:
            self._end_first_pass()
        self._reporter.stepped()
        if self._step > self.total_steps and not self._warned_of_overrun:
            self._warned_of_overrun = True
            warnings.warn(
                f"this is step {self._step}, and total_steps={self.total_steps}: layers have frozen too early for a "
                "training that goes on. Give the optimizer steps of all epochs: len(loader) * epochs // accumulation",
                stacklevel=4,
            )
        opened = self._upkeep.take_back(self._step, self.frozen)
        given_back = self._change(self.frozen - opened, record=True) if opened else None
        self._upkeep.check(self._step, self.frozen)
        if self._rates is not None:
            self._rates.check()
        self._reporter.notice_opened()
        view = self.view
        if self._watch.watching:
            self._watch.check(_training(view))
        self.policy.observe(view)
        event = self._decide() if self.policy.due(self._step, self.total_steps) else None
        self._upkeep.opened.clear()
        if self._step >= self.total_steps:
            self._upkeep.close()  # what a model is used for after its training is the user's
            self._summarize()
        self._next_wake = self._step + 1 if self._busy else self._next_due()
        return event or given_back

    @property
    def _busy(self) -> bool:
        """Whether there is something to do at each step, besides deciding where that is due."""
        return self._observing or self._watch.watching or self._reporter.busy or self._upkeep.needs_each_step

    def _next_due(self) -> int:
        """The next step at which a decision is due, or an earlier one where that is far off.

        The last step of the training and the first behind it are never skipped.
        """
        step = self._step + 1
        far = max(step, self._upkeep.next_check)
        if step <= self.total_steps + 1:
            far = min(far, max(step, self.total_steps))
        while step < far and not self.policy.due(step, self.total_steps):
            step += 1
        return step

    def _decide(self) -> FreezeEvent | None:
        wanted = frozenset(self.policy.decide(self.view))
        outside = sorted(index for index in wanted if not 0 <= index < len(self.layers))
        if outside:
            raise UsageError(
                f"{type(self.policy).__name__} wants to freeze layer {outside[0]} of {len(self.layers)}: "
                "indices run from 0 to one less"
            )
        if not (self.dry_run or self.policy.unfreezes):
            wanted = self._compiled.hold_back(wanted, self._planned, self._step)
        wanted = self.agree(wanted, len(self.layers))
        wanted -= self._upkeep.opened if self.policy.refreezes else self._upkeep.given_back
        if wanted == self._planned:
            return None
        return self._change(wanted, record=True)

    def _change(self, wanted: frozenset[int], record: bool = False) -> FreezeEvent:
        event = FreezeEvent(
            self._step,
            tuple(sorted(wanted - self._planned)),
            tuple(sorted(self._planned - wanted)),
            tuple(sorted(wanted)),
            len(self.layers),
        )
        before = self._planned
        if not self.dry_run:
            self._upkeep.change(event.froze, event.unfroze, event.frozen, self._step)
        self._planned = wanted
        self._watch.start(_training(self.view))
        if record:
            self.history.append(event)
            self._reporter.changed(event, before, self.finished)
        for listener in () if self.dry_run else self._listeners:
            listener(event)
        return event

    def _summarize(self) -> None:
        """Report once what a dry run would have done."""
        if self.dry_run and self._step and not self._summarized:
            self._summarized = True
            self._reporter.say(self.timeline.dry_run_summary())

    def _wake(self) -> None:
        """Have the next step look at everything."""
        self._next_wake = 0

    def _check_optimizers(self) -> None:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            missing = [p for p in layer.parameters() if p.requires_grad and id(p) not in held]
            # Beside weights that the user holds still, norms often stay open, to be given to the optimizer later.
            norms = any(not p.requires_grad for p in layer.parameters()) and all(p.dim() < 2 for p in missing)
            if missing and not norms:
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


def _training(view: View) -> tuple[int, ...]:
    """The active layers but those that the user holds still."""
    return tuple(index for index in view.active if index not in view.resting)


def _described(layers: Sequence[Layer]) -> list[tuple[str, list[int], set[int]]]:
    return [(layer.name, [id(p) for p in layer.own], {id(module) for module in layer.modules}) for layer in layers]


def _own_answer(wanted: frozenset[int], layers: int) -> frozenset[int]:
    return wanted


def _whole(total_steps: Any) -> int:
    """The number of steps as an int. A state that held NumPy's number or a tensor could not be loaded again."""
    try:
        steps = operator.index(total_steps)  # NumPy's and torch's whole numbers too
    except TypeError:
        steps = int(total_steps) if isinstance(total_steps, float) and total_steps.is_integer() else 0
    if steps < 1:
        raise UsageError(f"total_steps={total_steps!r}: give the number of optimizer steps of the whole training")
    return steps

"""Keeping frozen layers frozen: what the user's code switches back on, opens for itself, or moves all the same."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.freezing.freeze import freeze, is_frozen, settle_containers, settle_observers, unfreeze
from predictor.freezing.frozen_weights import FrozenWeights
from predictor.freezing.gradient_guard import GradientGuard
from predictor.freezing.learning_rates import innermost
from predictor.freezing.optimizer_state import begin_again
from predictor.freezing.wrappers import refuse_capture
from predictor.layers.layer import Layer

_MOST_STEPS_UNCHECKED = 100
"""Steps after which the frozen layers are looked at at the latest."""
_CHECKS = 20
"""How often they are in a training that is too short for that."""


class Upkeep:
    """Freezes and unfreezes layers, and looks after those that are frozen.

    Args:
        model: the model itself.
        optimizers: all of the training's.
        layers: those that may freeze. Others may be set later, while none is frozen.
        total_steps: optimizer steps of the whole training.
        wake: called where something is to be done at the next step. Held weakly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        layers: tuple[Layer, ...],
        total_steps: int,
        wake: Callable[[], None],
    ) -> None:
        self.layers = layers
        self.opened: set[int] = set()
        """Layers that the user has opened since the step before."""
        self.given_back: set[int] = set()
        """All that the user has opened since they were frozen."""
        self.moved: list[Callable[[], None]] = []
        """Called where frozen layers may have moved."""
        self.next_check = 0
        """The step at which the frozen layers are looked at, also where nothing tells of a change."""
        self._model, self._optimizers = model, optimizers
        self._every = max(1, min(_MOST_STEPS_UNCHECKED, total_steps // _CHECKS))
        self._wake: weakref.WeakMethod[Callable[[], None]] = weakref.WeakMethod(wake)
        self._guard = GradientGuard(self._on_dropped_gradient, self._on_opened)
        self._weights = FrozenWeights()
        self._warned_of_motion = self._warned_of_reset = self._warned_of_set = False
        self._before_steps: list[RemovableHandle] = []  # on the optimizers, while gradients may be set by hand
        self._stepped = False  # whether they were called since a layer froze
        self._sets_gradients = False  # whether the user's code has set one of a frozen layer

    def change(self, froze: Iterable[int], unfroze: Sequence[int], frozen: Sequence[int], step: int) -> None:
        """Freeze and unfreeze layers.

        Args:
            froze: indices in `layers` of those that freeze.
            unfroze: of those that unfreeze.
            frozen: of all that are frozen then.
            step: optimizer steps so far.
        """
        # Before the first step an optimizer's state can only be one that was loaded to resume, and what the policy
        # froze so early may be unfrozen by the controller's own state, which is loaded next.
        optimizers = self._optimizers if step else ()
        for index in froze:
            self._guard.guard(index, self.layers[index])
            freeze(self.layers[index], optimizers, self._model)
        unfreeze([self.layers[index] for index in unfroze], self._model)
        for index in unfroze:
            for parameter in self._guard.trained.get(index, ()):
                parameter.requires_grad_(True)
            self._guard.leave(index)
        begin_again(self._optimizers, [self.layers[index] for index in unfroze])
        settle_containers(self._model, self.layers, frozen)
        self._weights.keep(parameter for index in frozen for parameter in self.layers[index].parameters())
        self.next_check = step + self._every
        if froze:
            self._look_before_steps()

    @property
    def held_still(self) -> list[str]:
        """The names of what the user held still of the frozen layers when they froze."""
        held = {id(parameter) for parameters in self._guard.held_still.values() for parameter in parameters}
        return [name for name, parameter in self._model.named_parameters() if id(parameter) in held]

    def hold_still(self, indices: Iterable[int], held_still: Collection[str]) -> None:
        """Have of layers that are about to freeze stand still what did so in the training of a state, and nothing else.

        Args:
            indices: indices in `layers`.
            held_still: what `held_still` was there.
        """
        held = {id(parameter) for name, parameter in self._model.named_parameters() if name in held_still}
        for parameter in (parameter for index in indices for parameter in self.layers[index].parameters()):
            if id(parameter) in held:
                parameter.requires_grad_(False)
                parameter.grad = None
            elif parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)

    @property
    def whole_layer_rests(self) -> bool:
        """Whether the user held one of the frozen layers still as a whole when it froze."""
        return self._guard.whole_layer_rests

    @property
    def needs_each_step(self) -> bool:
        """Whether `take_back` has to be called at each step: no gradient tells of a layer that is opened while its
        outputs come from a cache.
        """
        return bool(self.moved) and self._guard.may_be_opened

    def take_back(self, step: int, frozen: frozenset[int]) -> frozenset[int]:
        """The frozen layers that the user has opened: what the user froze and unfreezes is the user's."""
        if self.moved or step >= self.next_check:
            self.opened.update(filter(self._guard.opened, frozen))
        taken = frozen & self.opened
        self.given_back |= taken
        return taken

    def check(self, step: int, frozen: frozenset[int]) -> None:
        """Freeze again what was switched back on, and see whether frozen weights move, where that is due."""
        if self._stepped and not self._sets_gradients:
            self._leave_steps()
        if step < self.next_check:
            return
        self.next_check = step + self._every
        self._freeze_again(frozen)
        self._check_weights(step)

    def close(self) -> None:
        """Guard nothing any more. Layers stay as they are."""
        self._guard.close()
        self._leave_steps()

    def _on_dropped_gradient(self, index: int) -> None:
        """A frozen layer had got a gradient. It is gone; the next step freezes the layer again."""
        self.next_check = 0
        self._call_wake()
        self._guard.hold_before_passes(self._model)
        self._warn_of_reset(index)

    def _on_opened(self, index: int) -> None:
        """The user has opened a frozen layer that had been held still. The next step gives it back."""
        self.opened.add(index)
        self._call_wake()

    def _look_before_steps(self) -> None:
        """Look before the next optimizer step, and before all others where need be, for gradients set by hand."""
        self._stepped = False
        if not self._before_steps:
            drop = partial(_call, weakref.WeakMethod(self._drop_set_gradients))
            own = map(innermost, self._optimizers)
            # Some call no `super().__init__`.
            hooked = [each for each in own if hasattr(each, "_optimizer_step_pre_hooks")]
            self._before_steps = [each.register_step_pre_hook(drop) for each in hooked]

    def _leave_steps(self) -> None:
        for handle in self._before_steps:
            handle.remove()
        self._before_steps = []

    def _drop_set_gradients(self) -> None:
        """Drop what is there as gradients of frozen layers, before an optimizer moves them by it."""
        self._stepped = True
        for index in self._guard.drop_gradients(but=self.opened):
            self._sets_gradients = True
            self._warn_of_set_gradient(index, stacklevel=5)

    def _call_wake(self) -> None:
        if (wake := self._wake()) is not None:
            wake()

    def _freeze_again(self, frozen: frozenset[int]) -> None:
        """Freeze again what the user's code has switched back on, and inform what keeps its outputs."""
        if frozen:
            settle_observers(self._model)
        reset = [index for index in sorted(frozen) if any(map(_may_move, self.layers[index].parameters()))]
        for index in reset:
            if is_frozen(self.layers[index]):  # so no backward pass has made these gradients
                self._sets_gradients = True
                self._look_before_steps()
                self._warn_of_set_gradient(index, stacklevel=7)
            else:
                self._warn_of_reset(index)
            freeze(self.layers[index], self._optimizers, self._model)
        for callback in self.moved if reset else ():
            callback()

    def _check_weights(self, step: int) -> None:
        """Warn where frozen weights move without a gradient, and inform what keeps their outputs."""
        refuse_capture()
        if not self._weights.moved():
            return
        for callback in self.moved:
            callback()
        if not self._warned_of_motion:
            self._warned_of_motion = True
            warnings.warn(
                f"frozen weights have moved before step {step}, though no optimizer has a gradient of them: a "
                "CUDA graph replays what was captured before they froze, or something writes to their .data. Capture "
                "the graph again after each change: controller.on_change(lambda event: capture())",
                stacklevel=6,
            )

    def _warn_of_reset(self, index: int) -> None:
        if self._warned_of_reset:
            return
        self._warned_of_reset = True
        warnings.warn(
            f"something switched frozen layer {index} ({self.layers[index].name}) back on; it is frozen again. Look "
            "for requires_grad_(True) in the training loop, or call controller.release() to train frozen layers",
            stacklevel=7,  # the loop, from a step; somewhere in the backward pass, from a hook
        )

    def _warn_of_set_gradient(self, index: int, stacklevel: int) -> None:
        if self._warned_of_set:
            return
        self._warned_of_set = True
        warnings.warn(
            f"something sets .grad of frozen layer {index} ({self.layers[index].name}) by hand, as code that averages "
            "or combines gradients and makes zeros of missing ones; from here on it is dropped before each optimizer "
            "step. Leave out parameters that require no gradient, or call controller.release() to train frozen layers",
            stacklevel=stacklevel,
        )


def _may_move(parameter: Tensor) -> bool:
    """Whether an optimizer may move a parameter: also by a gradient of zeros, under weight decay or momentum."""
    return parameter.requires_grad or parameter.grad is not None


def _call(method: "weakref.WeakMethod[Callable[[], None]]", *_: object) -> None:
    if (own := method()) is not None:
        own()

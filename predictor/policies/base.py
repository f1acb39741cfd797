"""What a freezing method is: it looks at a training and answers which layers should be frozen now."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.layers.flops import LayerFlops
from predictor.layers.layer import Layer
from predictor.model.first_look import FirstLook


@dataclass(frozen=True)
class View:
    """What a policy may look at. Gradients are those of the step just taken; there are none at step 0."""

    layers: tuple[Layer, ...]
    """Front to back. The head is not among them."""
    frozen: frozenset[int]
    """Indices in `layers` of those frozen now."""
    step: int
    """Optimizer steps done: 0 before the first."""
    total_steps: int
    """Optimizer steps of the whole training."""
    flops: LayerFlops | None = None
    """What the layers cost, for a policy that `wants_flops`. None before the first forward pass, and for a model on
    which FLOPs cannot be counted, such as a sharded one."""
    resting: frozenset[int] = frozenset()
    """Indices of the layers that the user holds still now: no parameter of theirs requires a gradient, and the
    controller did not freeze them."""
    look: FirstLook | None = None
    """What the gradients of the first batches say of each layer, at step 0, for a policy that `wants_look`. None where
    the training did not call `FreezeController.look`, or where that could not tell."""

    @property
    def progress(self) -> float:
        """The share of the training that is done, from 0 to 1."""
        return self.step / self.total_steps

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the layers that still train, front to back."""
        return tuple(index for index in range(len(self.layers)) if index not in self.frozen)


class FreezePolicy(ABC):
    """Decides which layers should be frozen. It changes nothing itself; a `FreezeController` carries its answer out.

    Order of calls: `bind`, then `decide` at step 0; both again where the training's first pass shows other layers, or
    where a policy that `wants_look` gets one. In every optimizer step: `rates` before it, `observe` after it, and
    `decide` where `due` says so.
    """

    every: int = 1
    """Optimizer steps between decisions."""
    freezes: bool = True
    """Whether it may freeze anything."""
    unfreezes: bool = False
    """Whether a layer that it froze may train again. Then a wholly frozen network is not the end of a training."""
    refreezes: bool = False
    """Whether it may freeze a layer that the user has opened since it was frozen: on evidence since then, and not by
    the time alone."""
    wants_flops: bool = False
    """Whether its views should have FLOPs, which cost a forward pass to count."""
    wants_look: bool = False
    """Whether it decides at step 0 by the gradients of the first batches, for which the training calls
    `FreezeController.look`. Then it is bound again, and its view at step 0 has `look`."""
    budget: float = 1.0
    """The share of the planned optimizer steps that the training should take."""
    rescaled: bool = True
    """Whether the training's schedule is rescaled to these steps. Otherwise the training is stopped after them."""
    lr_schedule: str | None = None
    """"linear": after the warm-up the learning rate should fall on a straight line to zero, whatever the training's own
    schedule is. None for that one."""
    lr_cooldown: float = 0.0
    """The last share of the steps taken over which the learning rate should fall on a straight line to zero."""
    passes: Mapping[int, int] = MappingProxyType({})
    """Samples that the policy sent forward through the model in passes of its own, by the index of the layer up to
    which each pass went. A comparison has to count this work."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "thaws" in vars(cls):  # a class variable or a property of a user's class
            _warn_of_thaws()
            cls.unfreezes = vars(cls)["thaws"]
            del cls.thaws

    @property
    def thaws(self) -> bool:
        """Deprecated name of `unfreezes`."""
        _warn_of_thaws()
        return self.unfreezes

    @thaws.setter
    def thaws(self, value: bool) -> None:
        _warn_of_thaws()
        self.unfreezes = value

    def worth_a_look(self, total_steps: int) -> bool:
        """Whether a look can change anything in a training of so many optimizer steps, where it `wants_look`."""
        return True

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Called once, before the first step.

        Args:
            model: the model itself, without what is wrapped around it.
            optimizer: the training's. Of several, an object with the parameter groups of all, in which those of the
                optimizer that holds most of the layers come first.
            layers: those that may freeze, front to back.
        """

    def observe(self, view: View) -> None:
        """Called after each optimizer step, before its gradients are cleared."""

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to decide after `step` optimizer steps.

        The answer depends on nothing else, so that several processes are asked at the same steps.
        """
        return step % self.every == 0

    @abstractmethod
    def decide(self, view: View) -> frozenset[int]:
        """The indices of all layers that should be frozen now. A frozen layer that is left out is unfrozen."""

    def rates(self, view: View) -> Mapping[int, float]:
        """The factors by which the next step's learning rate is multiplied, by layer index, where they are not 1.

        Called right before an optimizer step, when the learning rates are those of that step. After a restart it is
        called again: the answer follows from the view, the optimizer and the policy's state.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on after a restart: tensors, numbers, strings, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""

    def close(self) -> None:
        """Remove hooks and drop what takes memory."""


def _warn_of_thaws() -> None:
    warnings.warn("FreezePolicy.thaws is now called unfreezes", DeprecationWarning, stacklevel=3)

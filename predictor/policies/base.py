"""What a freezing method is: it looks at a training and answers which layers should be frozen now."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.layers.flops import LayerFlops
from predictor.layers.layer import Layer


@dataclass(frozen=True)
class View:
    """What a policy may look at. Gradients are those of the step just taken; there are none at step 0."""

    layers: tuple[Layer, ...]
    """Front to back; the head is not among them."""
    frozen: frozenset[int]
    """Places in `layers` of those frozen now."""
    step: int
    """Optimizer steps done: 0 before the first."""
    total_steps: int
    """Optimizer steps of the whole training."""
    flops: LayerFlops | None = None
    """What the layers cost, for a policy that `wants_flops`; None before the first forward pass, and for a model on
    which it cannot be counted, such as a sharded one."""

    @property
    def progress(self) -> float:
        """The share of the training that is done, from 0 to 1."""
        return self.step / self.total_steps

    @property
    def active(self) -> tuple[int, ...]:
        """Places of the layers that still train, front to back."""
        return tuple(place for place in range(len(self.layers)) if place not in self.frozen)


class FreezePolicy(ABC):
    """It judges, it never acts.

    bind -> decide at step 0 -> for every optimizer step: before it rates, after it observe, and where it is `due`
    decide.
    """

    every: int = 1
    """Optimizer steps between decisions."""
    freezes: bool = True
    """Whether it may freeze anything."""
    thaws: bool = False
    """Whether a layer that it froze may train again, so that a wholly frozen network is not the end of a training."""
    wants_flops: bool = False
    """Whether its views should have FLOPs, which cost a forward pass to count."""
    budget: float = 1.0
    """The share of the planned optimizer steps that the training should take."""
    rescaled: bool = True
    """Whether the training's schedule is rescaled to these steps; otherwise it is broken off after them."""
    passes: Mapping[int, int] = MappingProxyType({})
    """Samples that it has sent forward through the model beside the training, by the place of the layer up to which
    each pass went: work that a comparison has to count."""

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Called once, before the first step."""

    def observe(self, view: View) -> None:
        """Called after each optimizer step, while its gradients still stand."""

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to decide after `step` optimizer steps: by nothing else, so that several processes ask as one."""
        return step % self.every == 0

    @abstractmethod
    def decide(self, view: View) -> frozenset[int]:
        """The places of all layers that should be frozen now. A layer left out of it thaws. Changes nothing itself."""

    def rates(self, view: View) -> Mapping[int, float]:
        """The factors by which the next step's learning rate is multiplied, for layers where it is not 1.

        Asked right before an optimizer step, when the learning rates are those of that step. After a restart it is
        asked again: the answer follows from the view, the optimizer and the policy's state.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on after a restart: tensors, numbers, strings, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""

    def close(self) -> None:
        """Let go of hooks and memory."""

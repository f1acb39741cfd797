"""Freezing in other people's trainers: one thin file each, imported by those who use that trainer and by nobody else.

What the trainers' callbacks share is here. Each training gets a copy of the policy, so that a callback serves one
training after another, and what was frozen is let go at the end: a model can always be trained further.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.cache.feature_cache import FeatureCache
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy

Layers = Sequence[Layer] | Callable[[nn.Module], Sequence[Layer]] | None
"""The layers that may freeze: themselves, or what finds them in the trainer's model; by default `layers_of`."""


class Adapter:
    """A FreezeController that lives from the start of a trainer's training to its end."""

    controller: FreezeController | None = None
    """That of the training which runs, and afterwards of the last one, whose `history` says what froze. None before."""
    cache: FeatureCache | None = None
    """That of the training which runs, and afterwards, empty, of the last one. None without `ids`."""

    def __init__(self, policy: FreezePolicy, layers: Layers) -> None:
        if policy.budget != 1.0:
            raise UsageError(
                f"{type(policy).__name__} takes a share of {policy.budget} of the steps, and a callback cannot shorten "
                "a training: give the trainer that many steps instead"
            )
        self._policy = policy
        self._layers = layers
        self._running = False

    def _start(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        total_steps: int,
        *,
        done: int,
        state: dict[str, Any] | None,
        **options: Any,
    ) -> None:
        """Make the controller, with `done` steps of the training done before, as `state` says."""
        if done and state is None:
            raise UsageError(
                f"the checkpoint at step {done} was written without this callback, and does not say what was frozen: "
                "resume without the callback, or start anew with it"
            )
        self._finish()
        self.controller = FreezeController(
            model,
            optimizers,
            copy.deepcopy(self._policy),
            total_steps=total_steps,
            layers=self._layers(model) if callable(self._layers) else self._layers,
            **options,
        )
        self._running = True
        if done and state is not None:
            self.controller.load_state_dict(state)

    def _finish(self) -> None:
        """Let the frozen layers go, once: what is frozen by hand between two trainings is not ours."""
        if self.controller is not None and self._running:
            self._running = False
            if self.cache is not None:
                self.cache.close()
            self.controller.release()
            self.controller.close()

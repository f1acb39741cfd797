"""Freezing in other people's trainers: what the callbacks share. Each trainer has a file of its own beside this one.

Each training gets a copy of the policy, so that one callback serves one training after another. At the end frozen
layers are released, so that a model can always be trained further.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from predictor.cache.feature_cache import FeatureCache
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.freezing.messages import reason_of
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy

Layers = Sequence[Layer] | Callable[[nn.Module], Sequence[Layer]] | None
"""The layers that may freeze, or a function that finds them in the trainer's model. By default `layers_of`."""


class TrainerCallbackBase:
    """Holds a FreezeController from the start of a trainer's training to its end."""

    controller: FreezeController | None = None
    """The controller of the current or the last training. Its `history` says what froze. None before the first."""
    cache: FeatureCache | None = None
    """The cache of the current training or, empty, of the last one. None without `ids`."""

    def __init__(self, policy: FreezePolicy, layers: Layers, dry_run: bool = False) -> None:
        if policy.budget != 1.0:
            raise UsageError(
                f"{type(policy).__name__} takes a share of {policy.budget} of the steps, and a callback cannot shorten "
                "a training: give the trainer that many steps instead"
            )
        if policy.lr_schedule is not None or policy.lr_cooldown:
            raise UsageError(
                f"{type(policy).__name__} changes the learning rate's schedule, and a callback cannot: give the "
                "trainer that schedule instead"
            )
        self._policy = policy
        self._layers = layers
        self._dry_run = dry_run
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
        """Make the controller of a training.

        Args:
            model: as the trainer calls it.
            optimizers: over all parameters.
            total_steps: optimizer steps of the whole training.
            done: steps that were done before, in a training that resumes.
            state: the controller's state then; None where there is none.
            options: further arguments of the controller.
        """
        if done and state is None:
            raise UsageError(
                f"the checkpoint at step {done} was written without this callback, and does not say what was frozen: "
                "resume without the callback, or start a new training with it"
            )
        self._finish()
        self.controller = FreezeController(
            model,
            optimizers,
            copy.deepcopy(self._policy),
            total_steps=total_steps,
            layers=self._layers(model) if callable(self._layers) else self._layers,
            dry_run=self._dry_run,
            **options,
        )
        self._running = True
        if done and state is not None:
            self.controller.load_state_dict(state)

    def _look(self, loader: Any, loss: Callable[[Any], Tensor], *others: object) -> None:
        """Have the policy look at the training's first batches, if it wants to and they can be had.

        Args:
            loader: the trainer's.
            loss: from a batch to its loss.
            others: what else changes where a loss is computed, and is to be left as it was.
        """
        controller = self.controller
        assert controller is not None, "the training has started"
        if not controller.wants_look:
            return
        own = getattr(loader, "base_dataloader", loader)  # in Accelerate's, which counts batches and epochs
        if not isinstance(own, DataLoader) or isinstance(own.dataset, IterableDataset):
            controller.report_no_look(f"{type(own).__name__} is no DataLoader over numbered samples, to begin again")
            return
        try:
            controller.look(own, loss, _others=others)
        except Exception as error:  # the model's or the data's, as where only training gives a loss
            controller.report_no_look(reason_of(error))

    def _figures(self) -> dict[str, float]:
        """What is logged where the trainer logs: see `Timeline.figures`."""
        assert self.controller is not None, "there is a training"
        return self.controller.timeline.figures()

    def _finish(self) -> None:
        """Release the frozen layers, once: what is frozen by hand between two trainings is the user's."""
        if self.controller is not None and self._running:
            self._running = False
            if self.cache is not None:
                self.cache.close()
            self.controller.release()
            self.controller.close()

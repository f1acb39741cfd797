"""Freezing in Lightning's Trainer."""

from typing import Any

from predictor.errors import UsageError
from predictor.integrations import Adapter, Layers
from predictor.policies.base import FreezePolicy

try:
    import lightning.pytorch as pl
except ImportError:  # the same under its older name
    import pytorch_lightning as pl


class FreezeCallback(Adapter, pl.Callback):  # type: ignore[misc]
    """Freezes layers while a Trainer trains.

        trainer = Trainer(max_epochs=10, callbacks=[FreezeCallback(make_policy("smartfrz"))])
        trainer.fit(module, data)

    Policies are asked at the end of each batch in which an optimizer stepped (so `accumulate_grad_batches` counts),
    while its gradients stand: Lightning clears them in the next batch. Where you optimize by hand, clear them at the
    start of `training_step` rather than at its end, for policies that look at gradients.

    What it takes to resume is in Lightning's checkpoints; `trainer.fit(module, data, ckpt_path=...)` goes on.

    policy: from `make_policy`. layers: those that may freeze, by default `layers_of(module)`. total_steps: batches in
    which an optimizer steps, of the whole training; needed where it has no end, or where several optimizers step. stop:
    end the training once nothing but the head is left to train, as an EarlyStopping callback does.

    Raises UsageError when total_steps is needed and missing, and for what cannot freeze layers while it trains:
    DeepSpeed, FSDP1, DDP with a static graph, reentrant checkpointing.
    """

    def __init__(
        self, policy: FreezePolicy, *, layers: Layers = None, total_steps: int | None = None, stop: bool = False
    ) -> None:
        super().__init__(policy, layers)
        self._total_steps = total_steps
        self._stop = stop
        self._loaded: dict[str, Any] = {}
        self._steps_seen = 0

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into its checkpoints."""
        return self._loaded if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says until the optimizers are there."""
        self._finish()
        self.controller = None
        self._loaded = state_dict

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Make the controller: model and optimizers are those that train, their states loaded."""
        self._steps_seen = trainer.global_step
        self._start(
            trainer.strategy.model or pl_module,
            trainer.optimizers,
            self._total_steps or _total_steps(trainer),
            done=trainer.global_step,
            state=self.state_dict() or None,
        )

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once an optimizer step."""
        if trainer.global_step == self._steps_seen:
            return  # a batch whose gradients are only added up
        self._steps_seen = trainer.global_step
        assert self.controller is not None, "Lightning trains after it started"
        self.controller.step()
        if self._stop and self.controller.finished:
            trainer.should_stop = True

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Let the frozen layers go."""
        self._finish()


def _total_steps(trainer: "pl.Trainer") -> int:
    steps = trainer.estimated_stepping_batches
    if len(trainer.optimizers) > 1 or steps == float("inf"):
        raise UsageError(
            f"a training of {steps} steps with {len(trainer.optimizers)} optimizers: say "
            "FreezeCallback(..., total_steps=N), the number of batches in which an optimizer steps"
        )
    return int(steps)

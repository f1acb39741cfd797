"""Recording in Lightning's Trainer."""

from pathlib import Path
from typing import Any

from torch import Tensor

from collect.recording.callback import Layers, RecordingCallbackBase
from predictor.integrations.lightning import averages_next, planned_steps, refuse_unknown_length

try:
    import lightning.pytorch as pl
except ImportError:  # the same under its older name
    import pytorch_lightning as pl


class RecordingCallback(RecordingCallbackBase, pl.Callback):  # type: ignore[misc]
    """Records a Trainer's training.

        trainer = Trainer(max_epochs=10, callbacks=[RecordingCallback("runs/mine", probe=x)])
        trainer.fit(module, data)

    A step is a batch in which an optimizer stepped. Under manual optimization clear the gradients at the start of
    `training_step` rather than at its end, so that their norms are recorded.

    Lightning's checkpoints hold what is recorded so far; `trainer.fit(module, data, ckpt_path=...)` continues.

    Args:
        out: a folder, for `OUT/runs/ID.h5`, or the path of a new file that ends in .h5.
        probe: a batch of inputs on which `module(probe)` can be called; for another call see `call` of `Recording`.
        layers: the layers to record, or a function that finds them in the module. By default `layers_of`.
        total_steps: batches in which an optimizer steps, of the whole training. Needed where the training has no end,
            where several optimizers step, and under manual optimization that does not step in each batch.
        accuracy: the name under which the module logs the held-out accuracy, from 0 to 1.
        loss: the name under which it logs the held-out loss.
        options: further arguments of `Recording`: call, workload, family, source, seed, recipe, sampling.
    """

    def __init__(
        self,
        out: str | Path,
        probe: Any,
        *,
        layers: Layers = None,
        total_steps: int | None = None,
        accuracy: str = "val_acc",
        loss: str = "val_loss",
        **options: Any,
    ) -> None:
        super().__init__(out, probe, layers, **options)
        self._total_steps = total_steps
        self._names = accuracy, loss
        self._loaded: dict[str, Any] = {}
        self._running = False
        self._steps_seen = 0

    def state_dict(self) -> dict[str, Any]:
        """The state that Lightning writes into its checkpoints."""
        return self.recording.state_dict() if self._running and self.recording else self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the optimizers exist."""
        self._stop()
        self._running = False
        self._loaded = state_dict

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin to record: model and optimizers are those that train, their states loaded."""
        self._steps_seen = trainer.global_step
        state = self.state_dict()
        self._start(
            trainer.strategy.model or pl_module,
            trainer.optimizers,
            self._total_steps or planned_steps(trainer, pl_module, "RecordingCallback"),
            done=trainer.global_step,
            state=state,
        )
        self._running = True

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write the file before StochasticWeightAveraging replaces the weights, where it adds an epoch for that."""
        if averages_next(trainer, pl_module):
            self.on_train_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the loss, and record once an optimizer step."""
        if not self._running:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._add_loss(loss.detach())
        if trainer.global_step == self._steps_seen:
            refuse_unknown_length(trainer, pl_module, self._total_steps, "RecordingCallback")
            return
        self._steps_seen = trainer.global_step
        self._step()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Write the file."""
        if not self._running:
            return
        self._loaded, self._running = self.state_dict(), False
        accuracy, loss = self._names
        self._finish(trainer.callback_metrics, accuracy, loss)

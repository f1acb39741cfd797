"""Recording in Transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from collect.recording.callback import Layers, RecordingCallbackBase
from predictor.errors import UsageError
from predictor.integrations.huggingface import as_text, state_in_checkpoint


class RecordingCallback(RecordingCallbackBase, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Records a Trainer's training.

        probe = trainer.data_collator([eval_dataset[index] for index in range(80)])
        trainer.add_callback(RecordingCallback("runs/mine", probe))
        trainer.train()

    The Trainer's checkpoints hold what is recorded so far; `trainer.train(resume_from_checkpoint=...)` continues. The
    loss is that of the model's own output, as a mean over the step's batches. The accuracy and loss at the end are
    those of the last evaluation, where there was one.

    Args:
        out: a folder, for `OUT/runs/ID.h5`, or the path of a new file that ends in .h5.
        probe: a batch of the model's inputs, as the data collator makes it; labels may be in it.
        layers: the layers to record, or a function that finds them in the Trainer's model. By default `layers_of`.
        accuracy: the metric's name, as the Trainer logs it.
        options: further arguments of `Recording`: call, workload, family, source, seed, recipe, sampling.
    """

    def __init__(
        self,
        out: str | Path,
        probe: Any = None,
        *,
        layers: Layers = None,
        accuracy: str = "eval_accuracy",
        **options: Any,
    ) -> None:
        if probe is None:
            raise UsageError(
                "probe: give a batch of the model's inputs. Where restore_callback_states_from_checkpoint=True makes "
                "callbacks again, leave that setting out: without it the recording goes on all the same"
            )
        super().__init__(out, probe, layers, **options)
        self._accuracy = accuracy
        self._metrics: dict[str, Any] = {}
        self._losses: list[Tensor] = []
        self._hook: RemovableHandle | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints, as JSON."""
        saved = as_text(self.recording.state_dict() if self.recording else {})
        return {"args": {"out": str(self._out)}, "attributes": {"_saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record: model and optimizer are those that train, their states loaded."""
        self._start(
            kwargs["model"],
            [kwargs["optimizer"]],
            state.max_steps,
            done=state.global_step,
            state=state_in_checkpoint(self, state),
        )
        self._metrics = {}
        self._hook = kwargs["model"].register_forward_hook(self._note_loss)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the step. Gradients still exist here, and are cleared before `on_step_end`."""
        if self._losses:
            self._add_loss(torch.stack(self._losses).mean())
            self._losses.clear()
        self._step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the figures of the last evaluation."""
        self._metrics = dict(kwargs.get("metrics") or {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file."""
        self._unhook()
        self._finish(self._metrics, self._accuracy, "eval_loss")

    def _note_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keep the loss that a training pass returned. The recording's own passes are in evaluation mode."""
        if not model.training or torch.compiler.is_compiling():
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().float().mean())

    def _stop(self) -> None:
        self._unhook()
        super()._stop()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._losses.clear()

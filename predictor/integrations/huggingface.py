"""Freezing in Transformers' Trainer."""

import base64
import inspect
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import (
    CallbackHandler,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import ParallelMode, TrainingArguments

from predictor.cache.feature_cache import FeatureCache
from predictor.cache.ids_argument import IdsArgument
from predictor.errors import UsageError
from predictor.freezing.wrappers import Agreement
from predictor.integrations import Layers, TrainerCallbackBase
from predictor.policies import make_policy
from predictor.policies.base import FreezePolicy


class FreezeCallback(TrainerCallbackBase, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Freezes layers while a Trainer trains.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[FreezeCallback(make_policy("smartfrz"))])
        trainer.train()

    It begins with the training and not before: the Trainer gives its optimizer only parameters that train then, and
    what is frozen earlier is never trained. Policies are asked right after each optimizer step, before its gradients
    are cleared. The Trainer's checkpoints hold its state; `trainer.train(resume_from_checkpoint=...)` continues.

    A policy that `wants_look` looks at the first batches when training begins: see `FreezeController.look`. Losses are
    those of the Trainer's `compute_loss`. Without them, and for data without numbered samples, one line says so.

    What the Trainer reports to (TensorBoard, wandb, ...) gets, at each change and with each logged loss,
    `freeze/frozen_layers`, `freeze/step_flops_share` (FLOPs of a step, as a share of a full one's) and
    `freeze/saved_share` (FLOPs that were saved so far). Trackers put `train/` before these names.

    Args:
        policy: from `make_policy`, or a policy's name, with its settings as `options`. By name it can also be made
            again under `restore_callback_states_from_checkpoint=True`.
        layers: those that may freeze. By default `layers_of(model)`.
        ids: a column of the data set with a whole number for each sample. With it the frozen prefix's outputs are
            cached and its passes skipped, and `cache` is the FeatureCache of the training. It needs
            `remove_unused_columns=False`, and inputs that are padded to one length.
        memory_gb: features beyond this go to files.
        stop: stop the training once only the head still trains, as an EarlyStoppingCallback does, but with the last
            evaluation and checkpoint.
        dry_run: freeze nothing, and report at the end what would have frozen when. Figures are logged behind
            `freeze_dry_run/`.
        options: settings of a policy that is given by its name.

    Raises:
        UsageError: at the start of training, for what cannot freeze layers while it trains: DeepSpeed, FSDP1, DDP with
            a static graph or without `ddp_find_unused_parameters`, reentrant checkpointing.
    """

    def __init__(
        self,
        policy: FreezePolicy | str,
        *,
        layers: Layers = None,
        ids: str | None = None,
        memory_gb: float = 4.0,
        stop: bool = False,
        dry_run: bool = False,
        **options: Any,
    ) -> None:
        if policy == "":
            raise UsageError(
                "restore_callback_states_from_checkpoint=True makes callbacks again, and this one was made of objects: "
                "name the policy, FreezeCallback('smartfrz', threshold=0.5), or leave that setting out, without which "
                "the frozen layers are restored all the same"
            )
        named = isinstance(policy, str)
        if options and not named:
            raise UsageError(
                f"{', '.join(options)}: settings go with a policy's name, FreezeCallback('smartfrz', risk=1.0), or "
                "into make_policy"
            )
        super().__init__(make_policy(policy, **options) if isinstance(policy, str) else policy, layers, dry_run)
        more = {} if ids is None else {"ids": ids, "memory_gb": memory_gb}
        more |= {"dry_run": True} if dry_run else {}
        # The Trainer writes it as JSON, which has no paths; a policy takes either.
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        self._made_of = (
            {"policy": policy, **settings, **more, "stop": stop} if named and layers is None else {"policy": ""}
        )
        self._saved = ""
        self._ids, self._memory_gb, self._stop = ids, memory_gb, stop
        self._argument: IdsArgument | None = None
        self._reporters: list[TrainerCallback] = []
        self._changed = False

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints, as JSON."""
        if self.controller is not None:
            self._saved = as_text(self.controller.state_dict())
        return {"args": self._made_of, "attributes": {"_saved": self._saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the controller: model and optimizer are those that train, their states loaded."""
        many = args.parallel_mode == ParallelMode.DISTRIBUTED
        if many:
            _refuse_unfit(args)
        if self._ids is not None and args.n_gpu > 1:
            raise UsageError(
                f"ids={self._ids!r} with {args.n_gpu} GPUs in one process: start one process a GPU, with torchrun"
            )
        if self._ids is not None and args.remove_unused_columns:
            raise UsageError(
                f"ids={self._ids!r}: the Trainer removes columns that the model has no argument for: give "
                "TrainingArguments(remove_unused_columns=False)"
            )
        self._start(
            kwargs["model"],
            [kwargs["optimizer"]],
            state.max_steps,
            done=state.global_step,
            state=state_in_checkpoint(self, state),
            agree=Agreement() if many else None,
        )
        assert self.controller is not None, "it has just been made"
        self._reporters = _reporters()
        if self._ids is not None:
            self.cache = FeatureCache(self.controller, memory_gb=self._memory_gb)
            self._argument = IdsArgument(self.cache, self.controller, self._ids)
        if self.controller.wants_look:
            kwargs["model"].train()  # as the Trainer does before each step; a pretrained one may be in evaluation mode
            trainer = _owner_in_calls(lambda it: hasattr(it, "compute_loss") and hasattr(it, "callback_handler"))
            self._look(kwargs.get("train_dataloader"), partial(_loss, trainer, kwargs["model"]), trainer)
        self._changed = bool(self.controller.history)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the controller. Gradients still exist here, and are cleared before `on_step_end`."""
        assert self.controller is not None, "the Trainer steps after it began to train"
        self._changed |= self.controller.step() is not None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the freezing with each loss of the training."""
        if self._running and "loss" in (kwargs.get("logs") or {}):
            self._report(args, state, control, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log a change, and the last step, and stop where `stop` asks for it, with what an end at `max_steps` has."""
        assert self.controller is not None, "the Trainer steps after it began to train"
        if self._changed or state.global_step >= state.max_steps:
            self._changed = False
            self._report(args, state, control, kwargs)
        if not (self._stop and self.controller.finished):
            return
        control.should_training_stop = True
        # The Trainer asks for these at the last planned step, which is not reached. By epoch it asks all the same: an
        # epoch that is stopped early ends too.
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
        control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release the frozen layers."""
        self._finish()

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]
    ) -> None:
        for reporter in self._reporters:
            reporter.on_log(args, state, control, model=kwargs.get("model"), logs=self._figures())

    def _finish(self) -> None:
        if self._argument is not None:
            self._argument.close()
            self._argument = None
        super()._finish()


def _reporters() -> list[TrainerCallback]:
    """What the Trainer reports to: no event of a callback hands it over."""
    handler = _owner_in_calls(lambda owner: isinstance(owner, CallbackHandler))
    return [callback for callback in handler.callbacks if _is_reporter(callback)] if handler else []


def _owner_in_calls(wanted: Callable[[Any], bool]) -> Any:
    """The nearest object of a kind whose method is among the calls that led here; None where there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is not None and wanted(owner):
            return owner
        frame = frame.f_back
    return None


def _loss(trainer: Any, model: nn.Module, batch: Any) -> Tensor:
    """The loss as the Trainer computes it, of its label smoothing or of a `compute_loss` of the user's own."""
    if trainer is None:
        raise UsageError("there is no Trainer among the callers of on_train_begin")
    inputs = trainer._prepare_inputs(batch)
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.compute_loss(model, inputs)
        return loss.mean()


def _is_reporter(callback: TrainerCallback) -> bool:
    kinds = type(callback).__mro__
    if any(kind.__name__ == "DVCLiveCallback" for kind in kinds):
        return False  # it takes each call for a step of its own
    return any(kind.__module__.startswith("transformers.integrations") for kind in kinds)


def as_text(state: dict[str, Any]) -> str:
    """A state as a text, which the Trainer can write as JSON."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def state_in_checkpoint(callback: object, state: TrainerState) -> dict[str, Any] | None:
    """The state that a callback keeps as its attribute `_saved`; None where there is none.

    It is in the checkpoint whether or not the Trainer restores callbacks.
    """
    stored: Any = state.stateful_callbacks or {}
    text = stored.get(type(callback).__name__, {}).get("attributes", {}).get("_saved", "")
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True) if text else None


def _refuse_unfit(args: TrainingArguments) -> None:
    """The Trainer makes its DDP itself, so DDP has to look for parameters without gradients."""
    if getattr(args, "ddp_static_graph", False):  # newer than the oldest Transformers that works
        raise UsageError("ddp_static_graph=True cannot freeze layers while it trains: leave it out")
    if not args.fsdp and not args.ddp_find_unused_parameters:
        raise UsageError(
            f"ddp_find_unused_parameters={args.ddp_find_unused_parameters}: with several processes give "
            "TrainingArguments(ddp_find_unused_parameters=True), so that none waits for a frozen layer's gradients"
        )

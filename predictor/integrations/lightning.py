"""Freezing in Lightning's Trainer."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from predictor.cache.feature_cache import FeatureCache
from predictor.errors import UsageError
from predictor.integrations import Layers, TrainerCallbackBase
from predictor.policies.base import FreezePolicy

try:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers.logger import DummyLogger
except ImportError:  # the same under its older name
    import pytorch_lightning as pl
    from pytorch_lightning.loggers.logger import DummyLogger


class FreezeCallback(TrainerCallbackBase, pl.Callback):  # type: ignore[misc]
    """Freezes layers while a Trainer trains.

        trainer = Trainer(max_epochs=10, callbacks=[FreezeCallback(make_policy("smartfrz"))])
        trainer.fit(module, data)

    Policies are asked at the end of each batch in which an optimizer stepped (so `accumulate_grad_batches` counts),
    before its gradients are cleared: Lightning does that in the next batch. Under manual optimization clear them at the
    start of `training_step` rather than at its end, for policies that read gradients.

    A policy that `wants_look` looks at the first batches when training begins: see `FreezeController.look`. Losses are
    those of `training_step`, in which nothing is logged. There is no look, and one line says so, under manual
    optimization, where evaluation mode gives no loss, and for data without numbered samples.

    Lightning's checkpoints hold the callback's state; `trainer.fit(module, data, ckpt_path=...)` continues. The
    trainer's loggers get `freeze/frozen_layers`, `freeze/step_flops_share` (FLOPs of a step, of a full one's) and
    `freeze/saved_share` (FLOPs that were saved so far) at each change and as often as the trainer logs.

    Args:
        policy: from `make_policy`.
        layers: those that may freeze. By default `layers_of(module)`.
        total_steps: batches in which an optimizer steps, of the whole training. Needed where the training has no end,
            where several optimizers step, and under manual optimization that does not step in each batch.
        ids: returns the whole numbers of a batch's samples, as `lambda batch: batch[0]` does for (ids, x, y). With it
            the frozen prefix's outputs are cached and its passes skipped, and `cache` is the FeatureCache of the
            training.
        network: the attribute of the module that `training_step` calls on the batch, such as "net". Empty for
            `self(x)`.
        memory_gb: features beyond this go to files.
        stop: stop the training once only the head still trains, as an EarlyStopping callback does.
        dry_run: freeze nothing, and report at the end what would have frozen when. Figures are logged behind
            `freeze_dry_run/`.

    Raises:
        UsageError: total_steps is needed and missing; `training_step` does not call the network; or something cannot
            freeze layers while it trains: DeepSpeed, FSDP1, DDP with a static graph, reentrant checkpointing.
    """

    def __init__(
        self,
        policy: FreezePolicy,
        *,
        layers: Layers = None,
        total_steps: int | None = None,
        ids: Callable[[Any], Tensor | Iterable[int]] | None = None,
        network: str = "",
        memory_gb: float = 4.0,
        stop: bool = False,
        dry_run: bool = False,
    ) -> None:
        super().__init__(policy, layers, dry_run)
        self._total_steps = total_steps
        self._ids, self._network, self._memory_gb = ids, network, memory_gb
        self._pass = ExitStack()  # of the model's pass, inside the cache
        self._stop = stop
        self._loaded: dict[str, Any] = {}
        self._steps_seen = 0

    def state_dict(self) -> dict[str, Any]:
        """The state that Lightning writes into its checkpoints."""
        return self.controller.state_dict() if self._running and self.controller else self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the optimizers exist."""
        self._finish()
        self.controller = None
        self._loaded = state_dict

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Make the controller: model and optimizers are those that train, their states loaded."""
        self._steps_seen = trainer.global_step
        self._start(
            trainer.strategy.model or pl_module,
            trainer.optimizers,
            self._total_steps or planned_steps(trainer, pl_module, "FreezeCallback"),
            done=trainer.global_step,
            state=self.state_dict() or None,
        )
        assert self.controller is not None, "it has just been made"
        if self._ids is not None:
            network = self._named_network(pl_module)
            self.cache = FeatureCache(self.controller, model=network, memory_gb=self._memory_gb)
        self._look(trainer.train_dataloader, _loss_of(trainer, pl_module))
        if self.controller.history:
            self._log(trainer)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Let the cached outputs of these samples replace the frozen prefix's pass."""
        self._pass.close()  # of a batch that was interrupted
        if self._ids is not None and self.cache is not None and self._running:
            self._pass.enter_context(self.cache.batch(self._ids(batch)))

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """End the model's pass, after which the model must have been called."""
        self._pass.close()
        if self.cache is not None and not self.cache.hits + self.cache.misses:
            named = f"self.{self._network}(...)" if self._network else "self(...)"
            raise UsageError(
                f"network={self._network!r}: training_step did not call {named}, whose frozen layers were to be "
                "skipped: name the attribute that it calls, FreezeCallback(..., network='net')"
            )

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the controller, once an optimizer step."""
        self._pass.close()  # of a step that gave no loss
        if not self._running:
            return  # averaged weights get their statistics
        if trainer.global_step == self._steps_seen:
            refuse_unknown_length(trainer, pl_module, self._total_steps, "FreezeCallback")
            return  # a batch whose gradients are only accumulated
        self._steps_seen = trainer.global_step
        assert self.controller is not None, "Lightning trains after it started"
        if self.controller.step() or trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer)
        if self._stop and self.controller.finished:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Release the frozen layers before StochasticWeightAveraging collects statistics of its averaged weights."""
        if averages_next(trainer, pl_module):
            self._finish()

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Release the frozen layers."""
        if self._running:
            self._log(trainer)
        self._finish()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Remove the cache from the model. Layers stay frozen, so that the training can continue."""
        self._pass.close()

    def _finish(self) -> None:
        self._pass.close()
        self._loaded = self.state_dict()  # with what was frozen: Lightning may write a checkpoint after the end
        super()._finish()

    def _log(self, trainer: "pl.Trainer") -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self._figures(), step=trainer.global_step)

    def _named_network(self, module: "pl.LightningModule") -> nn.Module:
        try:
            network: nn.Module = module.get_submodule(self._network)
        except AttributeError as error:
            raise UsageError(
                f"network={self._network!r}: {type(module).__name__} has no module of this name: give the attribute "
                "that training_step calls"
            ) from error
        return network


def _loss_of(trainer: "pl.Trainer", module: "pl.LightningModule") -> Callable[[Any], Tensor]:
    """From a batch to the loss of `training_step`, outside of the training's own loop."""
    numbers = itertools.count()

    def loss_of(batch: Any) -> Tensor:
        takes = _checked_step(module)
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch)
        with _without_logging(trainer, module), trainer.precision_plugin.train_step_context():
            output = module.training_step(batch, next(numbers)) if takes else module.training_step(batch)
        loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise UsageError("training_step returned no loss")
        return loss

    return loss_of


def _checked_step(module: "pl.LightningModule") -> bool:
    """Whether `training_step` takes the batch's number. Raises UsageError where it gives no loss of a batch."""
    if not module.automatic_optimization:
        raise UsageError("under manual optimization training_step steps the optimizers itself")
    takes = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in takes:
        raise UsageError("training_step takes its batches from dataloader_iter")
    return len(takes) > 1 or any(parameter.kind == parameter.VAR_POSITIONAL for parameter in takes.values())


@contextmanager
def _without_logging(trainer: "pl.Trainer", module: "pl.LightningModule") -> Iterator[None]:
    """Have nothing logged: `log` works only in the training's own loop."""
    before = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        vars(module).update(log=_ignore, log_dict=_ignore)
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            vars(module).pop(name)
        vars(module).update(before)


def _ignore(*_: Any, **__: Any) -> None:
    """Does nothing."""


def planned_steps(trainer: "pl.Trainer", module: "pl.LightningModule", callback: str) -> int:
    """The batches of a whole training in which an optimizer steps.

    Args:
        trainer: the trainer, once it has its data.
        module: what it trains.
        callback: the name of the callback that asks, for the error.

    Raises:
        UsageError: the number cannot be known.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if len(trainer.optimizers) > 1 or (trainer.max_steps == -1 and (epochs == -1 or batches == float("inf"))):
        length = "without an end" if len(trainer.optimizers) < 2 else f"with {len(trainer.optimizers)} optimizers"
        raise UsageError(
            f"a training {length}: give {callback}(..., total_steps=N), the number of batches in which an optimizer "
            "steps"
        )
    if epochs == -1 or batches == float("inf"):
        return int(trainer.max_steps)
    if _averages_again(trainer, module):
        epochs -= 1
    factor = _accumulation(trainer)
    steps: int = sum(math.ceil(batches / factor(epoch)) for epoch in range(max(epochs, 1)))
    return steps if trainer.max_steps == -1 else min(steps, int(trainer.max_steps))


def refuse_unknown_length(
    trainer: "pl.Trainer", module: "pl.LightningModule", total_steps: int | None, callback: str
) -> None:
    """Raise UsageError where a loop of the user's own accumulates gradients: its number of steps is not known.

    Args:
        trainer: after a batch without an optimizer step.
        module: what it trains.
        total_steps: the number of steps, if it was given.
        callback: the name of the callback that asks, for the error.
    """
    if total_steps is None and not module.automatic_optimization and trainer.global_step == 0:
        raise UsageError(
            "under manual optimization no optimizer stepped in the first batch, so the number of steps cannot be "
            f"known: give {callback}(..., total_steps=N), the number of batches in which an optimizer steps"
        )


def averages_next(trainer: "pl.Trainer", module: "pl.LightningModule") -> bool:
    """Whether all epochs are done in which layers train, and StochasticWeightAveraging adds one for statistics."""
    return _averages_again(trainer, module) and trainer.current_epoch >= trainer.max_epochs - 2


def _accumulation(trainer: "pl.Trainer") -> Callable[[int], int]:
    """How many batches make a step, by epoch. Lightning's own estimate knows one number for all."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches  # type: ignore[no-any-return]
    return lambda epoch: trainer.accumulate_grad_batches


def _averages_again(trainer: "pl.Trainer", module: "pl.LightningModule") -> bool:
    """Whether StochasticWeightAveraging adds an epoch without steps, for the statistics of the averaged weights."""
    return trainer.max_epochs != -1 and any(
        isinstance(callback, pl.callbacks.StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module)
        for callback in trainer.callbacks
    )

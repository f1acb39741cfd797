"""Freezing in Lightning's Trainer."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from predictor.cache.feature_cache import FeatureCache
from predictor.errors import UsageError
from predictor.integrations import Layers, TrainerCallbackBase
from predictor.policies.base import FreezePolicy

try:
    import lightning.pytorch as pl
except ImportError:  # the same under its older name
    import pytorch_lightning as pl


class FreezeCallback(TrainerCallbackBase, pl.Callback):  # type: ignore[misc]
    """Freezes layers while a Trainer trains.

        trainer = Trainer(max_epochs=10, callbacks=[FreezeCallback(make_policy("smartfrz"))])
        trainer.fit(module, data)

    Policies are asked at the end of each batch in which an optimizer stepped (so `accumulate_grad_batches` counts),
    before its gradients are cleared: Lightning does that in the next batch. Under manual optimization clear them at the
    start of `training_step` rather than at its end, for policies that read gradients.

    Lightning's checkpoints hold the callback's state; `trainer.fit(module, data, ckpt_path=...)` continues.

    Args:
        policy: from `make_policy`.
        layers: those that may freeze. By default `layers_of(module)`.
        total_steps: batches in which an optimizer steps, of the whole training. Needed where the training has no end,
            or where several optimizers step.
        ids: returns the whole numbers of a batch's samples, as `lambda batch: batch[0]` does for (ids, x, y). With it
            the frozen prefix's outputs are cached and its passes skipped, and `cache` is the FeatureCache of the
            training.
        network: the attribute of the module that `training_step` calls on the batch, such as "net". Empty for
            `self(x)`.
        memory_gb: features beyond this go to files.
        stop: stop the training once only the head still trains, as an EarlyStopping callback does.

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
    ) -> None:
        super().__init__(policy, layers)
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
            self._total_steps or _total_steps(trainer),
            done=trainer.global_step,
            state=self.state_dict() or None,
        )
        assert self.controller is not None, "it has just been made"
        if self._ids is not None:
            network = self._named_network(pl_module)
            self.cache = FeatureCache(self.controller, model=network, memory_gb=self._memory_gb)

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Let the cached outputs of these samples replace the frozen prefix's pass."""
        self._pass.close()  # of a batch that was interrupted
        if getattr(trainer.fit_loop, "_skip_backward", False):
            # StochasticWeightAveraging has reset all running statistics. Nothing trains in this epoch, its last: it is
            # there to estimate them anew, which frozen layers would not.
            self._finish()
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
        if trainer.global_step == self._steps_seen or not self._running:
            return  # a batch whose gradients are only accumulated, or that trains nothing
        self._steps_seen = trainer.global_step
        assert self.controller is not None, "Lightning trains after it started"
        self.controller.step()
        if self._stop and self.controller.finished:
            trainer.should_stop = True

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Release the frozen layers."""
        self._finish()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Remove the cache from the model. Layers stay frozen, so that the training can continue."""
        self._pass.close()

    def _finish(self) -> None:
        self._pass.close()
        self._loaded = self.state_dict()  # with what was frozen: Lightning may write a checkpoint after the end
        super()._finish()

    def _named_network(self, module: "pl.LightningModule") -> nn.Module:
        try:
            network: nn.Module = module.get_submodule(self._network)
        except AttributeError as error:
            raise UsageError(
                f"network={self._network!r}: {type(module).__name__} has no module of this name: give the attribute "
                "that training_step calls"
            ) from error
        return network


def _total_steps(trainer: "pl.Trainer") -> int:
    steps = trainer.estimated_stepping_batches
    if len(trainer.optimizers) > 1 or steps == float("inf"):
        raise UsageError(
            f"a training of {steps} steps with {len(trainer.optimizers)} optimizers: give "
            "FreezeCallback(..., total_steps=N), the number of batches in which an optimizer steps"
        )
    return int(steps)

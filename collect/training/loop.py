"""The one training loop. Hooks extend it; it has no case for any experiment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from collect.training.checkpoint import Checkpoint
from collect.training.device import pick_device
from collect.training.state import Scores, Training
from collect.workloads.recipe import Workload
from data.sources import load_source
from data.sources.base import Source

__all__ = ["Hook", "Training", "train"]


class Hook:
    """Sees or steers a training.

    The order of calls:

        on_start
        for each step:
            forward, backward, clipping, optimizer.step()
            on_step
            zero_grad()
            after an epoch (unless scores="end"), and at the end: test, on_epoch
            scheduler.step(); a checkpoint, where one is due
        on_end

    A hook may read everything. It may freeze parameters (`requires_grad_(False)` and `grad = None`) and hold weights at
    zero, at the start or at any step, and choose the samples of the next epoch (`training.among`, `begin_epoch`) and
    how much each counts (`weigh`). Its time in on_start and on_step counts as training time, except inside
    `training.untimed()`; on_epoch and on_end are not timed. It must leave the global random generators alone.
    """

    def on_start(self, training: Training) -> None:
        """Run once, before the first step.

        When a training resumes, this still sees the model as it was before the first step. Afterwards everything is
        restored, and `load_state_dict` is called.
        """

    def on_step(self, training: Training) -> None:
        """Run after each optimizer step, before its gradients are cleared. A step that diverged is left out."""

    def on_epoch(self, training: Training) -> None:
        """Run after each row that is added to `training.curve`."""

    def on_end(self, training: Training) -> None:
        """Run once, when `training.status` is no longer "running"; also after a divergence."""

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: tensors, numbers, strings, None, and lists, tuples and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""


def train(
    workload: Workload,
    *,
    seed: int,
    hooks: Sequence[Hook] = (),
    device: str = "auto",
    budget: float = 1.0,
    rescaled: bool = True,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 300,
    progress: Callable[[int, int], None] | None = None,
    source: Source | None = None,
    scores: Scores = "epoch",
    left_out: float = 0.0,
    cooldown: float = 0.0,
    expected: float = 1.0,
) -> Training:
    """Train a workload to its end.

    The same seed gives the same numbers bit for bit on a CPU with the same number of threads, also for a training that
    was interrupted and resumed from its checkpoint. Denormal numbers are flushed to zero in this thread.

    A loss that is not finite ends the training with the status "diverged". On a CPU this happens before the step is
    taken. On a GPU it takes up to 20 steps, because reading the loss means waiting for the device.

    Args:
        workload: The model, its source and its recipe.
        seed: Of the initial weights, the order of the samples, augmentation and dropout.
        hooks: Called in this order.
        device: "auto", "cpu", "cuda", "cuda:1", ... or "mps".
        budget: The share of the recipe's steps to take, above 0 and at most 1.
        rescaled: Whether the learning-rate schedule is rescaled to these steps; otherwise it is cut off after them.
        checkpoint: The file that the training resumes from, if it exists. The state is saved to it every
            `checkpoint_seconds`, and when a hook stops the training. The caller removes it at the end.
        checkpoint_seconds: Time between saves.
        progress: Called after each step with the steps done and the steps of the whole training.
        source: The workload's source, if it is loaded already.
        scores: Test after each "epoch", or at the "end" alone.
        left_out: The share of the training samples that an epoch leaves out; the training has fewer steps. The seed
            draws them once, unless a hook such as `collect.hooks.sieve.Sieve` chooses others.
        cooldown: The last share of the steps over which the learning rate falls on a straight line to zero, from where
            the schedule has it when that begins.
        expected: The share of the recipe's steps that make a whole training, where a hook such as
            `collect.hooks.infobatch.InfoBatch` leaves out a number of samples that is not known before.

    Returns:
        The training, with its model, curve and status.

    Raises:
        UsageError: Settings that cannot work.
        CheckpointFault: A checkpoint that the training cannot resume from.
        FileFault: A checkpoint that cannot be written.
    """
    torch.set_flush_denormal(True)
    if source is None:
        source = load_source(workload.source, train_samples=workload.recipe.train_samples)
    where = pick_device(device)
    training = Training(
        workload,
        source,
        seed=seed,
        device=where,
        budget=budget,
        rescaled=rescaled,
        scores=scores,
        left_out=left_out,
        cooldown=cooldown,
        expected=expected,
    )
    saver = None if checkpoint is None else Checkpoint(checkpoint, checkpoint_seconds)
    _start(training, hooks, saver)
    while training.running:
        _run_epoch(training, hooks, saver, progress or _ignore)
    for hook in hooks:
        hook.on_end(training)
    return training


def _start(training: Training, hooks: Sequence[Hook], saver: Checkpoint | None) -> None:
    training.model.train()
    training.clock.start()
    for hook in hooks:
        hook.on_start(training)
    training.clock.stop()
    if saver is not None and saver.path.exists():
        saver.load(training, hooks)


def _run_epoch(
    training: Training, hooks: Sequence[Hook], saver: Checkpoint | None, progress: Callable[[int, int], None]
) -> None:
    """Train to the end of the epoch, or of the training."""
    batches = training.batches()
    training.clock.start()
    ended = False
    while training.running and not ended:
        if not training.take_step(batches):
            break
        for hook in hooks:
            hook.on_step(training)
        training.optimizer.zero_grad()
        progress(training.step, training.total_steps)
        ended = training.epoch_ended
        if training.scores_due:
            with training.untimed():
                _score(training, hooks)
        if training.step < training.total_steps:
            training.scheduler.step()
        if saver is not None and (training.status == "stopped" or (training.status == "running" and saver.due)):
            with training.untimed():
                saver.save(training, hooks)
    training.clock.stop()


def _score(training: Training, hooks: Sequence[Hook]) -> None:
    training.score()
    if not training.running:
        return
    for hook in hooks:
        hook.on_epoch(training)
    if training.running and training.step == training.total_steps:
        training.status = "finished"


def _ignore(step: int, total_steps: int) -> None:
    """The progress of a training without a callback."""

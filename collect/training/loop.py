"""The one training loop, extended by hooks alone."""

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
    """What wants to see or steer a training.

    The order of things:

        on_start
        for each step:
            forward, backward, clipping, optimizer.step()
            on_step
            zero_grad()
            after an epoch (unless scores="end"), and at the end: test, on_epoch
            the schedule goes on; a checkpoint, where one is due
        on_end

    A hook may read everything, freeze parameters (`requires_grad_(False)` and `grad = None`) and hold weights at zero,
    at the start or at any step, and choose the samples of the next epoch (`training.among`). Its time in on_start and
    on_step counts as the training's, but for what it does inside `training.untimed()`; on_epoch and on_end are not
    timed. It must leave the global random generators alone.
    """

    def on_start(self, training: Training) -> None:
        """Called once, before the first step. When a training goes on, this comes first, on the model as it was before
        the first step; then everything is brought to where it stood, and `load_state_dict` is called.
        """

    def on_step(self, training: Training) -> None:
        """Called after each optimizer step, while its gradients still stand; not for a step seen to have diverged."""

    def on_epoch(self, training: Training) -> None:
        """Called after each row that is added to `training.curve`."""

    def on_end(self, training: Training) -> None:
        """Called once, when `training.status` is no longer "running", also after a divergence."""

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on exactly: tensors, numbers, strings, None, and lists, tuples and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


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
) -> Training:
    """Train a workload to its end and return what became of it.

    The same seed gives the same numbers bit for bit on a CPU with the same number of threads, also when the training
    was broken off in between and went on from its checkpoint. Denormal numbers are flushed to zero in this thread.

    seed: of the initial weights, the order of the samples, augmentation and dropout.
    device: "auto", "cpu", "cuda", "cuda:1", ... or "mps".
    budget: the share of the recipe's steps to take, above 0 and at most 1.
    rescaled: whether the schedule is rescaled to these steps; otherwise it is broken off after them.
    checkpoint: the file that the training goes on from, where it exists, and saves its state to every
        `checkpoint_seconds` and when a hook stops it. It is left to the caller to remove it when all is done.
    progress: called after each step with the steps done and the steps of the whole training.
    source: the workload's source, where it is loaded already.
    scores: when to test: after each "epoch", or at the "end" alone.
    left_out: the share of the training samples that an epoch leaves out, so that the training has fewer steps. Which
        they are is drawn by the seed, once, unless a hook such as `collect.hooks.sieve.Sieve` chooses others.

    A loss that is no longer finite ends the training with the status "diverged". On a CPU that is seen before the step
    is taken; on a GPU up to 20 steps later, for looking means waiting.

    Raises UsageError for settings that cannot work, CheckpointFault for a checkpoint that it cannot go on from, and
    FileFault for one that cannot be written.
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
    """Go on to the end of the epoch under way, or of the training."""
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
    """Nobody watches."""

"""Data sieving in a training: its own answers choose the samples of its epochs."""

from typing import Any

import torch
from torch import Tensor

from collect.training.loop import Hook, Training
from data.sources.base import generator_for
from predictor.errors import UsageError
from predictor.sieving import SampleQueue


class Sieve(Hook):
    """Exchanges the samples of a training with `left_out` for samples that it left out, by a `SampleQueue`.

    A FeatureCache has no features of a sample that comes in for the first time.

    Args:
        every: Epochs between exchanges.
        moved: The share of the samples left out that come in at each exchange.

    Raises:
        UsageError: A setting that cannot work; and, at the start, a training that leaves nothing out.
    """

    def __init__(self, every: int = 1, moved: float = 0.5) -> None:
        if every < 1:
            raise UsageError(f"every={every}: give the epochs between exchanges, from 1")
        none = torch.empty(0, dtype=torch.int64)
        self.every = every
        self.samples = SampleQueue(none, none, moved)

    def on_start(self, training: Training) -> None:
        """Queue the samples that are left out, and watch the answers."""
        size = training.source.size("train")
        if training.among is None:
            raise UsageError(f"a sieve needs samples that are left out: give left_out, at least {1 / size:.2g}")
        left_out_N = torch.ones(size, dtype=torch.bool)
        left_out_N[training.among] = False
        ids_Q = left_out_N.nonzero().flatten()
        self.samples = SampleQueue(training.among, ids_Q[_shuffled(len(ids_Q), training)], self.samples.moved)
        self._training = training
        training.on_answers = self.samples.note

    def on_step(self, training: Training) -> None:
        """Exchange samples after the last step of an interval."""
        if training.step % (self.every * training.steps_per_epoch) == 0 and training.step < training.total_steps:
            self.samples.exchange(_shuffled(len(self.samples.among), training))
            training.among = self.samples.among

    def state_dict(self) -> dict[str, Any]:
        """The samples in use, the queue, and the record of each sample."""
        return self.samples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.samples.load_state_dict(state)
        self._training.among = self.samples.among

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers that go into a trial's result."""
        return {"left_out": len(self.samples.queue), "exchanges": self.samples.exchanges}


def _shuffled(size: int, training: Training) -> Tensor:
    """The numbers 0 to size - 1 in a random order, by the training's seed and step alone."""
    return torch.randperm(size, generator=generator_for("sieve", training.seed, training.step))

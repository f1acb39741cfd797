"""Circular data sieving: epochs go through some of the training samples, and the easiest make room for others."""

from math import ceil
from typing import Any

import torch
from torch import Tensor

from collect.train import Hook, Training
from data.sources.base import generator_for
from predictor.errors import UsageError

_HARDEST = torch.iinfo(torch.int32).max


class Sieve(Hook):
    """Exchanges samples that a training with `left_out` goes through for samples that it left out.

    Paper: Layer Freezing & Data Sieving (Yuan et al., NeurIPS 2022, arXiv 2209.11204). Rule: a random part of the
    samples is left out and stands in a queue. After each interval the samples with the fewest forgetting events in it
    go to the queue's tail, and as many from its head take their place. Our reading: a forgetting event is a sample that
    was right when seen last and now is wrong, as the training's own forward passes show it; an interval is `every`
    epochs, and a share `moved` of the queue's length moves; a sample that was wrong when seen last is harder than all
    that were right; those equally hard are drawn by lot. What is known of a sample is kept while it is left out, so
    that its first look after its return can be a forgetting event too.

    Costs a few operations on one batch's numbers at each step, none of which waits for a GPU, and one look at the
    counts at each exchange. A FeatureCache has nothing of a sample that comes in for the first time.

    every: epochs between exchanges. moved: the share of the samples left out that come in at each. Raises UsageError at
    the start of a training that leaves nothing out.
    """

    def __init__(self, every: int = 1, moved: float = 0.5) -> None:
        if every < 1:
            raise UsageError(f"every={every}: give the epochs between exchanges, from 1")
        if not 0 < moved <= 1:
            raise UsageError(f"moved={moved}: give a share of the samples left out, above 0 and at most 1")
        self.every = every
        self.moved = moved
        self.exchanges = 0
        """How often samples were exchanged."""

    def on_start(self, training: Training) -> None:
        """Queue up what is left out, and listen."""
        size, device = training.source.size("train"), training.device
        if training.among is None:
            raise UsageError(f"a sieve needs samples that are left out: give left_out, at least {1 / size:.2g}")
        left_out_N = torch.ones(size, dtype=torch.bool)
        left_out_N[training.among] = False
        ids_Q = left_out_N.nonzero().flatten()
        self.queue = ids_Q[_shuffled(len(ids_Q), training)]
        """Ids of the samples left out, those that come next first."""
        self._training = training
        self._right_N = torch.zeros(size, dtype=torch.bool, device=device)  # when seen last
        self._forgotten_N = torch.zeros(size, dtype=torch.int32, device=device)  # in this interval
        training.on_answers = self._note

    def on_step(self, training: Training) -> None:
        """Exchange samples after the last step of an interval."""
        if training.step % (self.every * training.steps_per_epoch) == 0 and training.step < training.total_steps:
            self._exchange(training)

    def state_dict(self) -> dict[str, Any]:
        """Who is in, who waits, and what is known of each sample."""
        return {
            "among": self._training.among,
            "queue": self.queue,
            "right": self._right_N.cpu(),
            "forgotten": self._forgotten_N.cpu(),
            "exchanges": self.exchanges,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        device = self._training.device
        self._training.among, self.queue = state["among"], state["queue"]
        self._right_N, self._forgotten_N = state["right"].to(device), state["forgotten"].to(device)
        self.exchanges = state["exchanges"]

    @property
    def figures(self) -> dict[str, Any]:
        """What a trial's result says of it."""
        return {"left_out": len(self.queue), "exchanges": self.exchanges}

    @torch.no_grad()
    def _note(self, ids_B: Tensor, right_B: Tensor) -> None:
        ids_B = ids_B.to(right_B.device, non_blocking=True)
        forgotten_B = self._right_N.index_select(0, ids_B) & ~right_B
        self._forgotten_N.index_add_(0, ids_B, forgotten_B.int())
        self._right_N.index_copy_(0, ids_B, right_B)

    def _exchange(self, training: Training) -> None:
        assert training.among is not None
        ids_M = training.among[_shuffled(len(training.among), training)]
        forgotten_M, right_M = self._forgotten_N.cpu()[ids_M], self._right_N.cpu()[ids_M]
        hardness_M = torch.where(right_M, forgotten_M, _HARDEST)
        ids_M = ids_M[torch.argsort(hardness_M, stable=True)]
        count = min(ceil(self.moved * len(self.queue)), len(ids_M))
        training.among = torch.cat([ids_M[count:], self.queue[:count]]).sort().values
        self.queue = torch.cat([self.queue[count:], ids_M[:count]])
        self._forgotten_N.zero_()
        self.exchanges += 1


def _shuffled(size: int, training: Training) -> Tensor:
    """The places 0 to size - 1 in a random order, by the training's seed and its step alone."""
    return torch.randperm(size, generator=generator_for("sieve", training.seed, training.step))

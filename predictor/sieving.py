"""Circular data sieving: each epoch leaves some training samples out, after some time the easiest ones."""

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from predictor.errors import UsageError

_HARDEST = torch.iinfo(torch.int32).max


class SampleQueue:
    """The samples that a training uses, those that wait, and what is known of each.

    Paper: Layer Freezing & Data Sieving (Yuan et al., NeurIPS 2022, arXiv 2209.11204).

    Rule: a random part of the samples is left out and waits in a queue. After each interval the samples with the fewest
    forgetting events in it go to the queue's tail, and as many from its head replace them.

    Differs: all of this is our reading. A forgetting event is a sample that was right when seen last and now is wrong,
    in the training's own forward passes. A share `moved` of the queue's length moves. A sample that was wrong when seen
    last is harder than all that were right, and equally hard samples are drawn at random. What is known of a sample is
    kept while it is left out, so that its first use after its return can be a forgetting event too.

    Cost: a few operations on one batch's numbers at each step, none of which waits for a GPU, and one look at the
    counts at each exchange.

    Args:
        among: ascending ids_M of the samples in use.
        queue: ids_Q of the others, in the order in which they return. Together they are all ids from 0.
        moved: the share of the queue that moves at each exchange, above 0 and at most 1.

    Raises:
        UsageError: `moved` is no such share.
    """

    def __init__(self, among: Tensor, queue: Tensor, moved: float = 0.5) -> None:
        if not 0 < moved <= 1:
            raise UsageError(f"moved={moved}: give a share of the samples left out, above 0 and at most 1")
        self.among = among
        self.queue = queue
        self.moved = moved
        self.exchanges = 0
        """How often samples were exchanged."""
        size = len(among) + len(queue)
        self._right_N = torch.zeros(size, dtype=torch.bool, device="cpu")  # when seen last
        self._forgotten_N = torch.zeros(size, dtype=torch.int32, device="cpu")  # in this interval

    @torch.no_grad()
    def note(self, ids_B: Tensor, right_B: Tensor) -> None:
        """Record whether the samples ids_B of a batch were classified right: right_B, of bools."""
        device = right_B.device
        self._right_N, self._forgotten_N = self._right_N.to(device), self._forgotten_N.to(device)
        ids_B = ids_B.to(device, non_blocking=True)
        forgotten_B = self._right_N.index_select(0, ids_B) & ~right_B
        self._forgotten_N.index_add_(0, ids_B, forgotten_B.int())
        self._right_N.index_copy_(0, ids_B, right_B)

    def exchange(self, order_M: Tensor) -> None:
        """End an interval. order_M: the positions 0 to M - 1 in random order, which decides among equally hard ones."""
        ids_M = self.among[order_M]
        forgotten_M, right_M = self._forgotten_N.cpu()[ids_M], self._right_N.cpu()[ids_M]
        hardness_M = torch.where(right_M, forgotten_M, _HARDEST)
        ids_M = ids_M[torch.argsort(hardness_M, stable=True)]
        count = min(ceil(self.moved * len(self.queue)), len(ids_M))
        self.among = torch.cat([ids_M[count:], self.queue[:count]]).sort().values
        self.queue = torch.cat([self.queue[count:], ids_M[:count]])
        self._forgotten_N.zero_()
        self.exchanges += 1

    def state_dict(self) -> dict[str, Any]:
        """Which samples are in use, which wait, and what is known of each."""
        return {
            "among": self.among,
            "queue": self.queue,
            "right": self._right_N.to("cpu", copy=True),
            "forgotten": self._forgotten_N.to("cpu", copy=True),
            "exchanges": self.exchanges,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`."""
        self.among, self.queue = state["among"], state["queue"]
        self._right_N, self._forgotten_N = state["right"].clone(), state["forgotten"].clone()  # written to in place
        self.exchanges = state["exchanges"]


class SieveSampler(Sampler[int]):
    """A DataLoader's sampler whose epochs leave some samples out, after some time the easiest ones (`SampleQueue`).

        sampler = SieveSampler(len(data), left_out=0.2)
        loader = DataLoader(data, batch_size=64, sampler=sampler)  # a sample comes with its index: (i, x, y)
        for epoch in range(epochs):
            for ids, x, y in loader:
                logits = model(x)
                sampler.note(ids, logits.argmax(dim=1) == y)

    Epochs are that much shorter: take the steps of the learning rate's schedule and of a FreezeController from
    `len(loader)`. Each iteration over the loader is an epoch, in another order. It works in one process, and is saved
    and loaded between epochs.

    Args:
        size: the number of samples.
        left_out: the share that an epoch leaves out, above 0 and below 1.
        every: epochs between exchanges.
        moved: the share of the samples left out that return at each exchange.
        seed: the seed of the order and of the first choice.

    Raises:
        UsageError: the shares leave no sample in or none out, or `every` is below 1.
    """

    def __init__(self, size: int, *, left_out: float = 0.2, every: int = 1, moved: float = 0.5, seed: int = 0) -> None:
        out = round(left_out * size)
        if not 0 < out < size:
            raise UsageError(
                f"left_out={left_out} of size={size}: give a share above 0 and below 1 that leaves samples out and in"
            )
        if every < 1:
            raise UsageError(f"every={every}: give the epochs between exchanges, from 1")
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._every = every
        self._epochs = 0
        order_N = self._order(size)
        self._samples = SampleQueue(order_N[out:].sort().values, order_N[:out], moved)

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        return len(self._samples.among)

    def __iter__(self) -> Iterator[int]:
        """The ids of the next epoch's samples, after an exchange where one is due."""
        if self._epochs and self._epochs % self._every == 0:
            self._samples.exchange(self._order(len(self)))
        self._epochs += 1
        return iter(self._samples.among[self._order(len(self))].tolist())

    def note(self, ids: Tensor, right: Tensor) -> None:
        """Record whether the samples of a batch, by their ids_B, were classified right: right_B, of bools."""
        self._samples.note(ids, right)

    def state_dict(self) -> dict[str, Any]:
        """The number of epochs so far, the samples' state, and the generator's."""
        return {
            "epochs": self._epochs,
            "generator": self._generator.get_state(),
            "samples": self._samples.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of a sampler with as many samples."""
        here, there = len(self) + len(self._samples.queue), len(state["samples"]["right"])
        if here != there:
            raise UsageError(f"the state is of {there} samples, and there are {here} here: make the sampler as it was")
        self._epochs = state["epochs"]
        self._generator.set_state(state["generator"])
        self._samples.load_state_dict(state["samples"])

    def _order(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator, device="cpu")

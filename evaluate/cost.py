"""FLOPs of a training: one optimizer step counted for each set of frozen layers, times the steps taken under it."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from collect.workloads import Workload
from data.sources.base import Source
from predictor.freezing.controller import FreezeController, FreezeEvent
from predictor.policies.base import FreezePolicy, View

_COUNTED_SAMPLES = 2
"""BatchNorm needs two; FLOPs grow in proportion to the batch, so more would tell nothing."""


class StepFlops:
    """FLOPs of one optimizer step of a workload, by which layers are frozen.

    Counts matrix products, convolutions and attention, forward and backward, as PyTorch's FlopCounterMode sees them,
    on a model of its own on the CPU; not normalization, elementwise operations and the optimizer's own work, which are
    a few percent. Torch's random numbers stand still.
    """

    def __init__(self, workload: Workload, source: Source) -> None:
        self._workload, self._source = workload, source
        self._known: dict[frozenset[int], int] = {}

    def __call__(self, frozen: frozenset[int]) -> int:
        """FLOPs of a step with these layers frozen; counted once a set."""
        if frozen not in self._known:
            with torch.random.fork_rng(devices=[]):
                self._known[frozen] = self._count(frozen)
        return self._known[frozen]

    def _count(self, frozen: frozenset[int]) -> int:
        recipe = self._workload.recipe
        batch = next(self._source.batches("train", min(_COUNTED_SAMPLES, recipe.batch_size), shuffle=False))
        model = self._workload.model(self._source).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        FreezeController(model, optimizer, _Fixed(frozen), total_steps=1)
        # The counter does not know the CPU's fused attention; its plain form has the same products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(batch[1]), batch[2]).backward()  # type: ignore[no-untyped-call]
        samples = min(recipe.batch_size, self._source.size("train")) * recipe.accumulate
        return int(counter.get_total_flops()) * samples // len(batch[2])


class _Fixed(FreezePolicy):
    """The same layers frozen all the time."""

    def __init__(self, frozen: frozenset[int]) -> None:
        self._frozen = frozen

    def decide(self, view: View) -> frozenset[int]:
        return self._frozen


def steps_by_pattern(history: Sequence[FreezeEvent], steps: int) -> dict[frozenset[int], int]:
    """How many of a training's `steps` optimizer steps each set of layers was frozen for, in order of appearance.

    An event at step s rules the steps after s.
    """
    counts: dict[frozenset[int], int] = {}
    begins = [0, *(min(event.step, steps) for event in history)]
    patterns = [frozenset[int](), *(frozenset(event.frozen) for event in history)]
    for pattern, begin, end in zip(patterns, begins, [*begins[1:], steps], strict=True):
        if end > begin:
            counts[pattern] = counts.get(pattern, 0) + end - begin
    return counts

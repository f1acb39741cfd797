"""FLOPs of a training: one optimizer step counted for each set of frozen layers, times the steps taken under it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from collect.workloads import Workload
from data.sources.base import Source
from predictor.cache.feature_cache import FeatureCache
from predictor.controller import FreezeController
from predictor.freezing.event import FreezeEvent
from predictor.layers.layer import layers_of
from predictor.policies.base import FreezePolicy, View

_COUNTED_SAMPLES = 2
"""BatchNorm needs two; FLOPs grow in proportion to the batch, so more samples would add nothing."""


class StepFlops:
    """FLOPs of one optimizer step of a workload, by which layers are frozen, and by what a feature cache skips.

    Counts matrix products, convolutions and attention, forward and backward, as PyTorch's FlopCounterMode does, on a
    model of its own on the CPU. Gradients of grouped convolutions are counted here, because FlopCounterMode takes them
    for those of one group. Normalization, elementwise operations and the optimizer's own work, a few percent, are not
    counted. Torch's random state is left as it was.
    """

    def __init__(self, workload: Workload, source: Source) -> None:
        self._workload, self._source = workload, source
        self._known: dict[tuple[frozenset[int], frozenset[int] | None], int] = {}

    @property
    def samples(self) -> int:
        """Samples in a step."""
        recipe = self._workload.recipe
        return min(recipe.batch_size, self._source.size("train")) * recipe.accumulate

    def __call__(self, frozen: frozenset[int], kept_under: frozenset[int] | None = None) -> int:
        """FLOPs of a step with these layers frozen; counted once.

        kept_under: the step begins from features that a FeatureCache kept where it cut while these layers were frozen,
            `frozen` or a part of them. Where it finds no cut, the step costs what it costs without the cache.
        """
        if (frozen, kept_under) not in self._known:
            with torch.random.fork_rng(devices=[]):
                self._known[frozen, kept_under] = self._count(frozen, kept_under)
        return self._known[frozen, kept_under]

    @cached_property
    def forward(self) -> int:
        """FLOPs of the forward passes of a step's samples, nothing skipped."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            batch, model = self._batch(), self._workload.model(self._source).eval()
            with FlopCounterMode(display=False) as counter:
                model(batch[1])
        return int(counter.get_total_flops()) * self.samples // len(batch[2])

    def _batch(self) -> Any:
        samples = min(_COUNTED_SAMPLES, self._workload.recipe.batch_size)
        return next(self._source.batches("train", samples, shuffle=False))

    def _count(self, frozen: frozenset[int], kept_under: frozenset[int] | None) -> int:
        batch, model = self._batch(), self._workload.model(self._source).train()
        # The counter does not know the CPU's fused attention; its plain form has the same products.
        with sdpa_kernel(SDPBackend.MATH):
            # Nothing frozen: no look for layers, which a model with adapters need not have.
            around = _brought_to(model, batch[1], frozen, kept_under) if frozen else nullcontext()
            with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter, around:
                F.cross_entropy(model(batch[1]), batch[2]).backward()  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops()) * self.samples // len(batch[2])


@torch.no_grad()
def _brought_to(
    model: nn.Module, inputs: Tensor, frozen: frozenset[int], kept_under: frozenset[int] | None
) -> AbstractContextManager[None]:
    """Freeze the layers, and fill a cache where one is asked for. Returns the context of the pass to be counted."""
    policy = _Chosen(frozen if kept_under is None else kept_under)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = FreezeController(model, optimizer, policy, total_steps=1, layers=layers_of(model, inputs), say=None)
    if kept_under is None:
        return nullcontext()
    # Its checks are no part of the pass to be counted.
    cache = FeatureCache(controller, check_inputs=False, adaptive=False)
    first, second = range(len(inputs)), range(len(inputs), 2 * len(inputs))
    for ids in (first, second):  # the same inputs, as if they were other samples
        with cache.batch(ids):
            model(inputs)
    policy.frozen = frozen
    controller.step()  # the last of the training, so that no search for another cut is in the pass to be counted
    return cache.batch(second)


def _conv_backward(
    gradient_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    *rest: Any,
    out_shape: Any = None,
) -> int:
    """FLOPs of a convolution's gradients: of each, the input's and the weight's, those of the forward pass.

    rest: bias sizes, stride, padding, dilation, transposed, output padding, groups, and which gradients are wanted.
    """
    transposed, wanted = rest[4], rest[7]
    each = int(conv_flop_count(x_shape, weight_shape, gradient_shape, transposed=transposed))
    return each * sum(map(bool, wanted[:2]))


_FORMULAS = {torch.ops.aten.convolution_backward: _conv_backward}


class _Chosen(FreezePolicy):
    """Freezes a given set of layers."""

    def __init__(self, frozen: frozenset[int]) -> None:
        self.frozen = frozen

    def decide(self, view: View) -> frozenset[int]:
        return self.frozen


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

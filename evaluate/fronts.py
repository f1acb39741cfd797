"""What a step costs with a frozen front, against the full step and against the layers behind the front alone."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from collect.train import Training
from collect.workloads import Workload
from data.sources.base import Batch, Source
from evaluate.cost import StepFlops
from evaluate.stopwatch import Spread, busy_seconds, warm_up
from predictor.freezing.controller import FreezeController
from predictor.freezing.layers import Layer
from predictor.policies import make_policy

LIMIT = 1.0
"""A step with frozen layers may cost no more than a full one."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
_SECONDS = 0.1
"""How long a measurement should at least take."""


@dataclass(frozen=True)
class FrontCost:
    """One workload's step with its first layers frozen."""

    workload: str
    frozen: int
    layers: int
    step: Spread
    """Its time over that of the full step."""
    suffix: Spread
    """The same with the front's outputs given and not computed: what is left where a cache works."""
    flops: float
    """The step's FLOPs over those of the full step: what `step` could be."""

    @property
    def holds(self) -> bool:
        """Whether the step costs no more than LIMIT allows."""
        return self.step.median <= LIMIT


def front_costs(
    workload: Workload, source: Source, device: torch.device, rounds: int, tick: Callable[[], None]
) -> list[FrontCost]:
    """Measure fronts of a quarter, a half, three quarters and all of the layers that may freeze, in turns.

    tick: called after each of the `rounds` rounds.
    """
    warm_up(workload, source, device)
    batch = next(source.batches("train", workload.recipe.batch_size, shuffle=False, device=device))
    full = _frozen_training(workload, source, device, 0)
    layers = len(full.layers)
    counts = sorted({round(share * layers) for share in _SHARES} - {0})
    fronts = [_frozen_training(workload, source, device, count) for count in counts]
    suffixes = [_frozen_training(workload, source, device, count) for count in counts]
    for training, count in zip(suffixes, counts, strict=True):
        _replay(training, training.layers[:count], batch)
    steps = max(1, round(_SECONDS / _seconds(full, batch, 2)))
    table = [_round([full, *fronts, *suffixes], batch, steps, tick) for _ in range(rounds)]
    ratios = [Spread.of(column) for column in zip(*table, strict=True)]
    flops = StepFlops(workload, source)
    return [
        FrontCost(workload.name, count, layers, step, suffix, flops(frozenset(range(count))) / flops(frozenset()))
        for count, step, suffix in zip(counts, ratios[: len(counts)], ratios[len(counts) :], strict=True)
    ]


def _frozen_training(workload: Workload, source: Source, device: torch.device, count: int) -> Training:
    training = Training(workload, source, seed=0, device=device)
    training.model.train()
    FreezeController(
        training.model, training.optimizer, make_policy("static", layers=count), total_steps=1, layers=training.layers
    )
    return training


def _replay(training: Training, layers: Sequence[Layer], batch: Batch) -> None:
    """Make frozen layers give what they give for this batch from now on, without computing it."""
    outputs: dict[nn.Module, list[Any]] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.setdefault(module, []).append(output)

    handles = [module.register_forward_hook(keep) for layer in layers for module in layer.modules]
    _seconds(training, batch, 1)
    for handle in handles:
        handle.remove()
    for module, given in outputs.items():
        again = itertools.cycle(given)
        module.forward = lambda *inputs, again=again, **options: next(again)


def _round(trainings: list[Training], batch: Batch, steps: int, tick: Callable[[], None]) -> list[float]:
    """The time of each training's steps over that of the first one's."""
    full, *others = [_seconds(training, batch, steps) for training in trainings]
    tick()
    return [seconds / full for seconds in others]


def _seconds(training: Training, batch: Batch, steps: int) -> float:
    """The mean time of a step, always on the same batch."""
    start = busy_seconds(training.device)
    for _ in range(steps):
        training.take_step(itertools.repeat(batch))
        training.optimizer.zero_grad()
    return (busy_seconds(training.device) - start) / steps

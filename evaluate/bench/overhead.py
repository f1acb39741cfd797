"""The share of a training that hooks take, at the cadence of a whole training: measured in one process, in turns."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from collect.hooks.cka import CKARecorder
from collect.hooks.recorder import Recorder
from collect.training.loop import Hook, Training
from collect.workloads import Workload
from data.sources.base import Batch, Source
from evaluate.trials.freezing import FreezeHook
from evaluate.trials.stopwatch import Spread, busy_seconds, warm_up
from predictor.model.config import PredictorConfig
from predictor.model.file import PredictorFile, save_predictor
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.policies import make_policy

LIMITS = {"recorder": 0.02, "recorder, similarity": 0.03, "smartfrz": 0.005}
"""The share of the training's own time that each may take."""


@dataclass(frozen=True)
class Overhead:
    """What some hooks cost in the training of one workload."""

    workload: str
    hooks: str
    """A key of LIMITS."""
    share: Spread
    """Time inside the hooks over time of the steps around them."""
    ratio: Spread
    """Time of steps with the hooks over that of as many steps without, which came just before. It has what `share`
    cannot see, such as what the hooks push out of the caches, and much more noise."""

    @property
    def limit(self) -> float:
        """The largest share that is allowed."""
        return LIMITS[self.hooks]

    @property
    def holds(self) -> bool:
        """Whether the limit is kept."""
        return self.share.median <= self.limit


@dataclass(frozen=True)
class _Span:
    """Steps from one snapshot to the next."""

    steps: int
    seconds: float
    inside: float
    """Those spent in the hooks, which `seconds` includes."""


def overheads(
    workload: Workload, source: Source, device: torch.device, rounds: int, tick: Callable[[], None]
) -> list[Overhead]:
    """Measure every entry of LIMITS: a span of steps without hooks, then one with each entry's, round by round.

    A span has one snapshot, as far from the next as in a whole training, so that the shares are those of a whole
    training. What comes at the end is spread over the snapshots. What a hook does at the start is left out.

    Args:
        workload: What is trained.
        source: Its data.
        device: Where.
        rounds: How many, at most 12, which is what a training has steps for.
        tick: Called after each span.
    """
    warm_up(workload, source, device)
    training, spec = Training(workload, source, seed=0, device=device), SampleSpec()
    training.model.train()
    batches = _endless(training)
    hooks = _start_hooks(training, spec, batches)
    spans: dict[str, list[_Span]] = {name: [] for name in ("", *hooks)}
    for _ in range(rounds):
        for name, measured in spans.items():
            measured.append(_span(training, batches, spec, hooks.get(name, ())))
            tick()
    training.status = "finished"
    plain = spans.pop("")
    return [
        _overhead(workload.name, name, plain, measured, _end(training, hooks[name]) / (rounds + 1))
        for name, measured in spans.items()
    ]


def _start_hooks(training: Training, spec: SampleSpec, batches: Iterator[Batch]) -> dict[str, list[Hook]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.safetensors"
        # An untrained one costs the same as a trained one. At this threshold it never freezes, which costs most.
        config = PredictorConfig()
        save_predictor(path, PredictorFile(FreezePredictor(config), spec, threshold=1.0, card={}))
        freezing = FreezeHook(make_policy("smartfrz", predictor=path))
    hooks: dict[str, list[Hook]] = {
        "recorder": [Recorder(spec)],
        "recorder, similarity": [Recorder(spec), CKARecorder(spec)],
        "smartfrz": [freezing],
    }
    for hook in itertools.chain(*hooks.values()):
        hook.on_start(training)
    training.take_step(batches)  # its gradients are what the policy looks at
    for _ in range(config.window * training.total_steps // spec.snapshots):
        _nudge(training)
        freezing.on_step(training)  # until its window is full: before, it predicts nothing
    training.optimizer.zero_grad()
    return hooks


@torch.no_grad()
def _nudge(training: Training) -> None:
    """Move every weight a little: the policy leaves out a snapshot at which nothing has moved."""
    for parameter in training.model.parameters():
        parameter.mul_(0.9999)


def _span(training: Training, batches: Iterator[Batch], spec: SampleSpec, hooks: Sequence[Hook]) -> _Span:
    first, inside = training.step, 0.0
    start = busy_seconds(training.device)
    while training.step == first or not spec.due(training.step, training.total_steps):
        training.take_step(batches)
        start_of_clock = busy_seconds(training.device)
        before = busy_seconds(training.device)
        for hook in hooks:
            hook.on_step(training)
        # Less what reading this clock takes: in a step of a few milliseconds it counts.
        inside += busy_seconds(training.device) - before - (before - start_of_clock)
        training.optimizer.zero_grad()
    return _Span(training.step - first, busy_seconds(training.device) - start, inside)


def _endless(training: Training) -> Iterator[Batch]:
    while True:
        yield from training.batches()


def _end(training: Training, hooks: Sequence[Hook]) -> float:
    start = busy_seconds(training.device)
    for hook in hooks:
        hook.on_end(training)
    return busy_seconds(training.device) - start


def _overhead(workload: str, hooks: str, plain: list[_Span], spans: list[_Span], late: float) -> Overhead:
    shares = [(span.inside + late) / (span.seconds - span.inside) for span in spans]
    ratios = [(b.seconds / b.steps) / (a.seconds / a.steps) for a, b in zip(plain, spans, strict=True)]
    return Overhead(workload, hooks, Spread.of(shares), Spread.of(ratios))

"""The memory that a frozen prefix frees: gradients, optimizer state, activations and the peak of a step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from collect.training.loop import Training
from data.sources.base import Batch
from evaluate.bench.frozen_prefixes import counts_of
from evaluate.bench.suffix import Subject, suffix_training
from evaluate.trials.stopwatch import PeakMemory, warm_up
from predictor.controller import FreezeController
from predictor.policies.base import FreezePolicy, View

TOLERANCE = 0.01
"""The share by which activations may exceed the limit."""


@dataclass(frozen=True)
class Change:
    """Bytes before and after a prefix froze."""

    before: int
    after: int
    limit: int
    """Those of the layers behind the prefix trained alone, on precomputed outputs of it."""


@dataclass(frozen=True)
class PrefixMemory:
    """The memory that freezing the first layers of one workload in mid-training frees, without a cache."""

    workload: str
    frozen: int
    layers: int
    gradients: Change
    """Of the parameters, when the optimizer has taken its step."""
    optimizer: Change
    """Tensors of the optimizer's state, at the same moment."""
    activations: Change
    """What the forward pass saves for the backward pass, parameters and buffers left out."""
    peak_before: int | None
    """How far a step raises the memory in use, as PeakMemory has it; None where it cannot be measured."""
    peak_after: int | None
    peak_note: str | None
    """Why there is no peak, where there is none."""

    @property
    def holds(self) -> bool:
        """Whether nothing is left of the frozen layers."""
        exact = all(change.after == change.limit for change in (self.gradients, self.optimizer))
        return exact and self.activations.after <= (1 + TOLERANCE) * self.activations.limit


@dataclass(frozen=True)
class _Step:
    """Bytes of one step."""

    gradients: int
    optimizer: int
    activations: int
    peak: int | None = None
    peak_note: str | None = None


def prefix_memory(subject: Subject, tick: Callable[[], None]) -> list[PrefixMemory]:
    """Measure the prefixes of `counts_of`. tick: called after each."""
    subject = replace(subject, workload=subject.workload.with_recipe(accumulate=1, augment=False))
    warm_up(subject.workload, subject.source, subject.device)
    batches = subject.batches(epoch=0)[:1]
    rows = []
    for count in counts_of(len(subject.training().layers)):
        rows.append(_measure(subject, count, batches))
        tick()
    return rows


def _measure(subject: Subject, count: int, batches: Sequence[Batch]) -> PrefixMemory:
    training = subject.training()
    controller = FreezeController(
        training.model, training.optimizer, _Later(count), total_steps=9, layers=training.layers, say=None
    )
    _step(training, batches)  # before it the optimizer has no state
    controller.step()
    before = _step_with_peak(training, batches)
    controller.step()  # the prefix freezes
    after = _step_with_peak(training, batches)
    layers = len(training.layers)
    del training, controller
    alone = suffix_training(subject, count, batches)
    limit = _step(alone, batches)
    return PrefixMemory(
        subject.workload.name,
        count,
        layers,
        Change(before.gradients, after.gradients, limit.gradients),
        Change(before.optimizer, after.optimizer, limit.optimizer),
        Change(before.activations, after.activations, limit.activations),
        before.peak,
        after.peak,
        before.peak_note,
    )


class _Later(FreezePolicy):
    """Freezes a prefix after the second step."""

    def __init__(self, count: int) -> None:
        self._count = count

    def decide(self, view: View) -> frozenset[int]:
        return frozenset(range(self._count if view.step > 1 else 0))


def _step_with_peak(training: Training, batches: Sequence[Batch]) -> _Step:
    training.optimizer.zero_grad()
    memory = PeakMemory(training.device)
    step = _step(training, batches)
    return replace(step, peak=memory.bytes, peak_note=memory.note)


def _step(training: Training, batches: Sequence[Batch]) -> _Step:
    """Take a step on the first batch."""
    training.optimizer.zero_grad()
    with saved_bytes(training.model) as saved:
        training.take_step(iter(batches))
    gradients = sum(p.grad.nbytes for p in training.model.parameters() if p.grad is not None)
    return _Step(gradients, state_bytes(training.optimizer), sum(saved.values()))


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within it, the storages that are saved for backward: address -> bytes; each once, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        # Detached, since an output that its own node held on to would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps besides the parameters."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )

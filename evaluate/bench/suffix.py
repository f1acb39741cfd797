"""The limit that a frozen prefix could reach: the layers behind it trained alone, on precomputed outputs of it."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from collect.training.loop import Training
from collect.training.optimizer import make_optimizer
from collect.workloads import Workload
from data.sources.base import Batch, Source
from predictor.cache.cut_points import Call, trace_calls
from predictor.errors import UsageError
from predictor.freezing.freeze import freeze
from predictor.layers.layer import Layer
from predictor.layers.tensors import tensors_in

_BATCHES = 4
_COMPUTED = object()
"""Stands for a call whose output is not given."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a workload's training on a device."""

    workload: Workload
    source: Source
    device: torch.device

    def training(self) -> Training:
        """A new training, before its first step."""
        training = Training(self.workload, self.source, seed=0, device=self.device)
        training.model.train()
        return training

    def batches(self, epoch: int) -> list[Batch]:
        """A few whole batches, always of the same samples, in an order that depends on the epoch."""
        size = self.workload.recipe.batch_size
        few = self.source.limited(size * min(_BATCHES, self.source.size("train") // size))
        return list(few.batches("train", size, epoch=epoch, shuffle=True, device=self.device, drop_last=True))


class _Reached(Exception):
    """A forward pass has run as far as it should."""


def suffix_training(subject: Subject, count: int, batches: Sequence[Batch]) -> Training:
    """A training in which the first `count` layers' modules are never called: their outputs for `batches` are given.

    Its optimizer holds the other parameters alone. Train it on `batches` in their order, over and over. What a
    model computes outside its modules, such as the sum of a residual connection, is still computed. Raises UsageError
    when none of the modules is ever called.
    """
    training = frozen_training(subject, count)
    rest = nn.ParameterList(parameter for parameter in training.model.parameters() if parameter.requires_grad)
    training.optimizer = make_optimizer(rest, subject.workload.recipe)
    answers: dict[nn.Module, list[Any]] = defaultdict(list)
    for batch in batches:
        args, kwargs = _arguments(training, batch)
        calls, _ = trace_calls(training.model, args, kwargs)
        prefix = set(_prefix_calls(calls, training.layers[:count]))
        for call in calls:
            answers[call.module].append(call if call in prefix else _COMPUTED)
    for module, ready in answers.items():
        if any(call is not _COMPUTED for call in ready):
            module.__dict__["forward"] = _given(module.forward, ready)
    return training


def prefix_pass(subject: Subject, count: int, batches: Sequence[Batch]) -> Callable[[], None]:
    """What computes the first `count` layers alone, in evaluation mode and without gradients, on the next batch."""
    training = frozen_training(subject, count)
    training.model.eval()
    args, kwargs = _arguments(training, batches[0])
    calls, _ = trace_calls(training.model, args, kwargs)
    last = max(_prefix_calls(calls, training.layers[:count]), key=lambda call: call.end)
    runs = itertools.cycle(range(last.nth + 1))

    def stop(*_: object) -> None:
        if next(runs) == last.nth:
            raise _Reached

    last.module.register_forward_hook(stop)
    endless = itertools.cycle(batches)

    def run() -> None:
        with torch.no_grad():
            _run_up_to(training, endless)

    return run


def frozen_training(subject: Subject, count: int) -> Training:
    """A training whose first `count` layers are frozen, without anything that watches it."""
    training = subject.training()
    for layer in training.layers[:count]:
        freeze(layer, [training.optimizer])
    return training


def _prefix_calls(calls: Sequence[Call], layers: Sequence[Layer]) -> Iterator[Call]:
    """The outermost calls that hold nothing that trains and end no later than the last one of these layers' modules."""
    modules = {module for layer in layers for module in layer.modules}
    ends = [call.end for call in calls if call.module in modules]
    if not ends:
        raise UsageError(f"layer {layers[0].name!r} is used without a call of its module: its limit cannot be measured")

    def belongs(call: Call) -> bool:
        return call.end <= max(ends) and not any(parameter.requires_grad for parameter in call.module.parameters())

    return (call for call in calls if belongs(call) and not (call.parent is not None and belongs(call.parent)))


def _given(forward: Callable[..., Any], ready: Sequence[Any]) -> Callable[..., Any]:
    """Takes the place of a module's forward: answers its calls in the order in which they were traced."""
    answers = itertools.cycle([call if call is _COMPUTED else _output(call) for call in ready])

    def answer(*args: Any, **kwargs: Any) -> Any:
        output = next(answers)
        if output is _COMPUTED:
            return forward(*args, **kwargs)
        return output() if callable(output) else output

    return answer


def _output(call: Call) -> Any:
    if tuple(tensor._version for tensor in tensors_in(call.output)) == call.versions:
        return call.output
    # The model writes into it. What it makes of it each time should not add up; to a clock values do not matter else.
    kept = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call.output)
    return lambda: tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, kept)


def _arguments(training: Training, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a training calls its model with."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = training.model.register_forward_pre_hook(stop, with_kwargs=True)
    _run_up_to(training, iter([batch]))
    handle.remove()
    return found[0]


def _run_up_to(training: Training, batches: Iterator[Batch]) -> None:
    """Begin a step whose forward pass something in the model will interrupt."""
    try:
        training.take_step(batches)
    except _Reached:
        return
    raise RuntimeError("the forward pass did not come to where it should stop")

"""When each part of a model is first used: recorded in one forward pass, or taken from the order of definition."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from predictor.layers.isolated_pass import isolated
from predictor.layers.parts import holds_weight
from predictor.layers.tensors import copied, tensors_in


@dataclass(frozen=True)
class ExecutionOrder:
    """When a model's parts and parameters are used, as moments: numbers of which only the order has a meaning."""

    first: dict[nn.Module, int]
    """First use of each part that is used."""
    last: dict[nn.Module, int]
    """Last use of it."""
    parameters: dict[int, int]
    """First use of a parameter, by its id."""
    ends: frozenset[nn.Module] = field(default=frozenset())
    """Parts with weights whose outputs are the model's and feed no other part with weights."""


def definition_order(model: nn.Module, parts: Iterable[nn.Module]) -> ExecutionOrder:
    """The order in which parts are defined. A container's own parameters come just before what it contains."""
    moments = {part: moment for moment, part in enumerate(parts)}
    parameters: dict[int, int] = {}
    for module in model.modules():
        first = min((moments[part] for part in module.modules() if part in moments), default=None)
        if first is not None:
            for parameter in module.parameters(recurse=False):
                parameters.setdefault(id(parameter), first)
    return ExecutionOrder(moments, dict(moments), parameters)


def traced_order(model: nn.Module, parts: Iterable[nn.Module], example: object) -> ExecutionOrder:
    """The order in which a call of the model uses its parts.

    The model is left as it was (see `isolated`).

    Args:
        model: the model.
        parts: its parts, from `parts_of`.
        example: a tuple of inputs, a dict of named ones, or the only one.

    Raises:
        Exception: what the model raises.
    """
    recorder, example = _UseRecorder(model, tuple(parts)), copied(example)
    with isolated(model), ExitStack() as hooks:
        # TorchScript modules take no hooks; uses of their weights are recorded all the same.
        for part in (part for part in recorder.parts if not isinstance(part, ScriptModule)):
            hooks.callback(part.register_forward_pre_hook(recorder.called).remove)
        with recorder:
            if isinstance(example, tuple):
                output = model(*example)
            elif isinstance(example, Mapping):
                output = model(**example)
            else:
                output = model(example)
    return recorder.order(output)


class _UseRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the first use of parts and parameters, and follows which part's output feeds which part.

    It sits below autograd, where every operator arrives with the very tensors that it computes with. So a parameter's
    use is recorded however it happens: by a module's call, by attention that takes its children's weights, or by name.

    For each storage it knows the parts with weights whose outputs are in it. A part is removed there once its output
    has fed another. What is left for the model's outputs at the end are its heads. It follows storages rather than
    tensors, since views and slices write into one another.
    """

    def __init__(self, model: nn.Module, parts: tuple[nn.Module, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self._clock = itertools.count()
        self._first: dict[nn.Module, int] = {}
        self._last: dict[nn.Module, int] = {}
        self._parameters: dict[int, int] = {}
        self._known = {id(parameter) for parameter in model.parameters()}
        self._fed: set[nn.Module] = set()
        self._outputs_in: dict[int, frozenset[nn.Module]] = {}
        # Storages that hold nothing of the example: weights of parts, and what is computed from them and buffers alone.
        self._weights_in: dict[int, frozenset[nn.Module]] = {}
        # Weak references, so that no other storage gets the number of a freed one; the memory itself is freed.
        self._pins: list[StorageWeakRef] = []
        for tensor in model.buffers():
            self._mark(self._weights_in, tensor, frozenset())
        self._holders = _holders(parts)
        holders_in: dict[int, set[frozenset[nn.Module]]] = {}
        for parameter in model.parameters():
            holders = self._holders.get(id(parameter), frozenset())
            holders_in.setdefault(_number(parameter), set()).add(frozenset(filter(holds_weight, holders)))
        for parameter in model.parameters():
            # Weights of several parts that are flattened into one storage cannot be distinguished.
            found = holders_in[_number(parameter)]
            self._mark(self._weights_in, parameter, next(iter(found)) if len(found) == 1 else frozenset())

    def called(self, part: nn.Module, inputs: object) -> None:
        """Record that a part is called now."""
        now = next(self._clock)
        self._first.setdefault(part, now)
        self._last[part] = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record what it uses and what it returns."""
        result = func(*args, **(kwargs or {}))
        now = next(self._clock)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        for tensor in inputs:
            if id(tensor) in self._known:
                self._parameters.setdefault(id(tensor), now)
        self._follow({_number(tensor) for tensor in inputs}, list(tensors_in(result)))
        return result

    def order(self, output: object) -> ExecutionOrder:
        """The recorded order. output: that of the model."""
        for part in self.parts:
            # A part whose weights are used without a call. A weight that two parts share is evidence for neither.
            own = [id(p) for p in part.parameters() if len(self._holders[id(p)]) == 1]
            used = min((self._parameters[p] for p in own if p in self._parameters), default=None)
            if used is not None:
                self._first[part] = min(self._first.get(part, used), used)
                self._last.setdefault(part, used)
        numbers = (_number(tensor) for tensor in tensors_in(dict(output) if isinstance(output, Mapping) else output))
        ends = frozenset[nn.Module]().union(*(self._outputs_in.get(number, ()) for number in numbers))
        return ExecutionOrder(self._first, self._last, self._parameters, ends.intersection(self._first) - self._fed)

    def _follow(self, inputs: set[int], results: list[Tensor]) -> None:
        weights = frozenset[nn.Module]().union(*(self._weights_in.get(number, ()) for number in inputs))
        if inputs <= self._weights_in.keys():
            for result in results:
                if _number(result) not in self._outputs_in:
                    self._mark(self._weights_in, result, weights)
            return
        sources = frozenset[nn.Module]().union(*(self._outputs_in.get(number, ()) for number in inputs))
        if weights:
            self._fed = (self._fed | sources) - weights
        for result in results:
            self._weights_in.pop(_number(result), None)
            self._mark(self._outputs_in, result, weights or sources - self._fed)

    def _mark(self, table: dict[int, frozenset[nn.Module]], tensor: Tensor, parts: frozenset[nn.Module]) -> None:
        number = _number(tensor)
        if number < 0:
            return
        if number not in self._weights_in and number not in self._outputs_in:
            self._pins.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        table[number] = parts


def _holders(parts: Iterable[nn.Module]) -> dict[int, frozenset[nn.Module]]:
    """The parts that hold each parameter, by its id."""
    holders: dict[int, frozenset[nn.Module]] = {}
    for part in parts:
        for parameter in part.parameters():
            holders[id(parameter)] = holders.get(id(parameter), frozenset()) | {part}
    return holders


def _number(tensor: Tensor) -> int:
    """A number that two tensors have in common if and only if they share memory; -1 for tensors without memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1

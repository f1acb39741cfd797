"""When each part of a model is first used: recorded in one forward pass, or taken from the order of definition."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from predictor.layers.code_state import users_hooks_before
from predictor.layers.isolated_pass import isolated
from predictor.layers.parts import holds_weight
from predictor.layers.tensors import Storages, copied, few_samples, number_of, tensors_anywhere_in, tensors_in

_NONE: frozenset[nn.Module] = frozenset()


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
    without_gradients: frozenset[nn.Module] = field(default=frozenset())
    """Parts that compute only where no gradients are recorded."""

    def without(self, modules: Collection[nn.Module]) -> "ExecutionOrder":
        """The order without all that is in some modules, as if they were never used."""
        first, last = ({p: t for p, t in uses.items() if p not in modules} for uses in (self.first, self.last))
        ids = {id(parameter) for module in modules for parameter in module.parameters()}
        parameters = {number: moment for number, moment in self.parameters.items() if number not in ids}
        return ExecutionOrder(
            first, last, parameters, self.ends.intersection(first), self.without_gradients - set(modules)
        )

    def then(self, other: "ExecutionOrder") -> "ExecutionOrder":
        """Put another order behind this one. What both use is first used in this one."""
        after = 1 + max((*self.first.values(), *self.last.values(), *self.parameters.values()), default=0)
        first, last = ({part: after + moment for part, moment in uses.items()} for uses in (other.first, other.last))
        parameters = {number: after + moment for number, moment in other.parameters.items()}
        return ExecutionOrder(
            first | self.first, self.last | last, parameters | self.parameters, self.ends | other.ends
        )


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
    args = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
    return _traced(model, tuple(parts), model, args, dict(example) if isinstance(example, Mapping) else {})


def order_of_call(
    model: nn.Module,
    parts: Iterable[nn.Module],
    called: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ours: Collection[int] = (),
) -> ExecutionOrder:
    """The order in which a training's call of a module uses its parts, seen on its first samples.

    In evaluation mode all layers compute, also those that a training leaves out at random. What gradients flow through
    is seen in a second pass, in the modes that the modules are in: a detector computes its losses in training alone, a
    teacher takes part without gradients. Hooks on `called` itself do not run, which are the training's, unless it
    cannot run without those of the user that come before it: they may make its inputs.

    Args:
        model: the model.
        parts: its parts, from `parts_of`.
        called: the model, or a module in it that is called on its own.
        args: positional inputs of the call.
        kwargs: named inputs.
        ours: ids of parameters that the user does not hold still, though they may be frozen now.

    Raises:
        Exception: what the model raises, on a few samples and on all.
    """
    own = set(called.modules())
    inside = tuple(part for part in parts if part in own)
    call: Callable[..., object] = called.forward
    try:
        few = few_samples((args, dict(kwargs)))
        order = _traced(model, inside, call, *few)
    except Exception:
        few = args, dict(kwargs)
        try:
            order = _traced(model, inside, call, *few)
        except Exception:
            if not any(users_hooks_before(called)):
                raise
            call = partial(_called_with_hooks, called)
            order = _traced(model, inside, call, *few)
    try:
        flow = _traced(model, inside, call, *few, gradients=True)
    except Exception:
        return order
    return ExecutionOrder(order.first, order.last, order.parameters, flow.ends).without(_bystanders(called, flow, ours))


def _called_with_hooks(module: nn.Module, *args: Any, **kwargs: Any) -> object:
    """Call a module as torch does, with the user's hooks alone, and of these with those before the call."""
    for hook, with_kwargs in users_hooks_before(module):
        made = hook(module, args, kwargs) if with_kwargs else hook(module, args)
        if made is not None and with_kwargs:
            args, kwargs = made
        elif made is not None:
            args = made if isinstance(made, tuple) else (made,)
    return module.forward(*args, **kwargs)


def at_rest(module: nn.Module, ours: Collection[int]) -> bool:
    """Whether the user holds all parameters of a module still. ours: ids of those that are frozen by a controller."""
    return not any(parameter.requires_grad or id(parameter) in ours for parameter in module.parameters())


def _bystanders(model: nn.Module, flow: ExecutionOrder, ours: Collection[int]) -> set[nn.Module]:
    """Networks that the user holds still and that run without gradients alone, as a teacher, with all inside them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        inside = [part for part in module.modules() if part in flow.first]
        has_parameters = any(True for _ in module.parameters())
        if inside and has_parameters and flow.without_gradients.issuperset(inside) and at_rest(module, ours):
            found.update(module.modules())
    return found


def _traced(
    model: nn.Module,
    parts: tuple[nn.Module, ...],
    call: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradients: bool = False,
) -> ExecutionOrder:
    """What a call uses. gradients: in the modules' own modes, and with gradients, as in a training step."""
    recorder = _UseRecorder(model, parts)
    args, kwargs = copied((args, dict(kwargs)))
    with isolated(model, as_in_training=gradients), ExitStack() as hooks:
        hooks.enter_context(_unseen_by_other_modes())
        # TorchScript modules take no hooks; uses of their weights are recorded all the same.
        for part in (part for part in recorder.parts if not isinstance(part, ScriptModule)):
            hooks.callback(part.register_forward_pre_hook(recorder.called).remove)
        with recorder:
            output = call(*args, **kwargs)
    return recorder.order(output)


def _unseen_by_other_modes() -> AbstractContextManager[object]:
    """Without the user's modes below autograd, such as one that counts FLOPs."""
    disabled = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    return cast(AbstractContextManager[object], disabled())


class _UseRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the first use of parts and parameters, and follows which part's output feeds which part.

    It sits below autograd, where every operator arrives with the very tensors that it computes with. So a parameter's
    use is recorded however it happens: by a module's call, by attention that takes its children's weights, or by name.

    For each storage it knows the parts with weights whose outputs are in it. A part is removed there once its output
    has fed another. What is left for the model's outputs at the end are its heads. It follows storages rather than
    tensors, since views and slices write into one another. What is detached feeds nothing: the loss does not flow back
    through it. A part whose output is detached and else feeds nothing is a head too, such as a detector's proposals.
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
        self._detached_parts: set[nn.Module] = set()
        self._with_gradients: set[nn.Module] = set()
        self._detached: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id
        self._outputs_in = Storages()
        # Storages that hold nothing of the example: weights of parts, and what is computed from them and buffers alone.
        self._weights_in = Storages()
        for tensor in model.buffers():
            self._weights_in.set(tensor, _NONE)
        self._holders = _holders(parts)
        holders_in: dict[int, set[frozenset[nn.Module]]] = {}
        for parameter in model.parameters():
            holders = self._holders.get(id(parameter), _NONE)
            holders_in.setdefault(number_of(parameter), set()).add(frozenset(filter(holds_weight, holders)))
        for parameter in model.parameters():
            # Weights of several parts that are flattened into one storage cannot be distinguished.
            found = holders_in[number_of(parameter)]
            self._weights_in.set(parameter, next(iter(found)) if len(found) == 1 else _NONE)

    def called(self, part: nn.Module, inputs: object) -> None:
        """Record that a part is called now."""
        now = next(self._clock)
        self._first.setdefault(part, now)
        self._last[part] = now
        if torch.is_grad_enabled() and not holds_weight(part):
            self._with_gradients.add(part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record what it uses and what it returns."""
        result = func(*args, **(kwargs or {}))
        now = next(self._clock)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        for tensor in inputs:
            if id(tensor) in self._known:
                self._parameters.setdefault(id(tensor), now)
                if torch.is_grad_enabled():
                    self._with_gradients.update(p for p in self._holders.get(id(tensor), ()) if not holds_weight(p))
        results = list(tensors_in(result))
        self._follow(inputs, results)
        if func is torch.ops.aten.detach.default:
            self._detached_parts |= self._sources(inputs)
            self._detached.update({id(tensor): tensor for tensor in results})
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
        outputs = tensors_anywhere_in(dict(output) if isinstance(output, Mapping) else output)
        ends = self._sources(outputs) | self._detached_parts
        without = frozenset(self._first) - self._with_gradients
        ends = ends.intersection(self._first) - self._fed
        return ExecutionOrder(self._first, self._last, self._parameters, ends, without)

    def _sources(self, tensors: Iterable[Tensor]) -> frozenset[nn.Module]:
        """The parts whose outputs these hold."""
        return _NONE.union(*(self._outputs_in.get(tensor, _NONE) for tensor in tensors))

    def _follow(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        weights = _NONE.union(*(self._weights_in.get(tensor, _NONE) for tensor in inputs))
        if all(tensor in self._weights_in for tensor in inputs):
            for result in results:
                if result not in self._outputs_in:
                    self._weights_in.set(result, weights)
            return
        if torch.is_grad_enabled():
            self._with_gradients |= weights
        sources = self._sources(tensor for tensor in inputs if self._feeds(tensor))
        if weights:
            self._fed = (self._fed | sources) - weights
        for result in results:
            self._weights_in.drop(result)
            self._outputs_in.set(result, weights or sources - self._fed)

    def _feeds(self, tensor: Tensor) -> bool:
        """Whether a loss would flow back through this input. Without gradients, whatever is not detached."""
        return tensor.requires_grad if torch.is_grad_enabled() else id(tensor) not in self._detached


def _holders(parts: Iterable[nn.Module]) -> dict[int, frozenset[nn.Module]]:
    """The parts that hold each parameter, by its id."""
    holders: dict[int, frozenset[nn.Module]] = {}
    for part in parts:
        for parameter in part.parameters():
            holders[id(parameter)] = holders.get(id(parameter), frozenset()) | {part}
    return holders

"""Where a model's frozen front can be cut off: its calls in order, and running it with the front left out."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from predictor.layers.tensors import tensors_in

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


@dataclass(eq=False)
class Call:
    """One call of a module in a forward pass."""

    name: str
    module: nn.Module
    nth: int
    """How often the module had been called before in this pass."""
    parent: "Call | None"
    start: int
    """Place among all starts and ends of calls."""
    end: int = -1
    output: Any = None
    versions: tuple[int, ...] = ()
    """How often each of the output's tensors had been written to when the call ended."""


@dataclass(frozen=True)
class Cut:
    """What a pass with the front left out is given, and what it skips. Modules in neither run as ever."""

    given: tuple[Call, ...]
    """Calls whose outputs are given: one, or several where a connection leads around the last of them."""
    skipped: tuple[Call, ...]
    """Calls that only have to seem to happen."""
    batch: int
    """Samples in the pass that it was found in: the size of the dimension that follows the batch."""
    _stand_ins: dict[int, list[Any]] = field(default_factory=dict)  # for the skipped calls, by the size of the batch

    @property
    def name(self) -> str:
        """The foremost module whose output is given."""
        return self.given[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """All modules whose outputs are given, front to back."""
        return tuple(call.name for call in self.given)

    def leaves(self) -> list[Tensor]:
        """The tensors of all outputs that are given."""
        return [tensor for call in self.given for tensor in tensors_in(call.output)]

    def answers(self, leaves: Iterable[Tensor], batch: int) -> dict[nn.Module, dict[int, Any]]:
        """What each module answers to each of its calls that are left out, in a pass on `batch` samples."""
        if batch not in self._stand_ins:
            self._stand_ins[batch] = [_stand_in(call.output, self.batch, batch) for call in self.skipped]
        answers: dict[nn.Module, dict[int, Any]] = defaultdict(dict)
        for call, stand_in in zip(self.skipped, self._stand_ins[batch], strict=True):
            # A tuple or a dict is made anew, since the model may change it.
            answers[call.module][call.nth] = stand_in if isinstance(stand_in, Tensor) else _filled(stand_in)
        rest = iter(leaves)
        for call in self.given:
            answers[call.module][call.nth] = (
                next(rest) if isinstance(call.output, Tensor) else _filled(call.output, rest)
            )
        return answers

    def forget_values(self) -> None:
        """Keep the shapes of what the modules gave and let the values go."""
        for call in (*self.given, *self.skipped):
            call.output = _stand_in(call.output, self.batch, self.batch)
            call.parent = None


@torch.no_grad()
def trace_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Call], Any]:
    """Every module call of one forward pass, in the order of their starts, outputs kept; and the pass's result."""
    calls: list[Call] = []
    stack: list[Call] = []
    counts: dict[nn.Module, int] = defaultdict(int)
    clock = 0

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            nonlocal clock
            clock += 1
            call = Call(name, module, counts[module], stack[-1] if stack else None, clock)
            counts[module] += 1
            stack.append(call)
            calls.append(call)

        return hook

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal clock
        clock += 1
        call = stack.pop()
        call.end, call.output, call.versions = clock, output, versions_of(list(tensors_in(output)))

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, result


def best_cut(calls: Sequence[Call], batch: int, right: Callable[[Cut], bool]) -> Cut | None:
    """The cut that skips most and is given least, of those that a frozen front allows; None where none is right.

    calls: of one pass, from `trace_calls`. right: whether a pass with this cut gives what the pass without it gave.

    The front ends where the first module begins that holds a parameter that trains. A module that ends before that,
    whose parent does not, can be left out as a whole. At first all of their outputs are given. Then as many as can be,
    counted from the front, are only made to seem to happen, and then each of the others that can. Modules without
    parameters are treated like the rest in the first round and run in the second: something hidden in them may be
    needed. Where both rounds fail, one output alone is given and all behind it runs.
    """
    whole = whole_calls(calls)
    weighty = [call for call in whole if any(True for _ in call.module.parameters())]
    if not weighty:
        return None
    for among in (whole, weighty):
        if any(map(keepable(batch), among)) and right(_given_from(among, 0, batch)):
            return _with_least(among, batch, right)
    singles = (
        Cut((call,), tuple(earlier for earlier in among if earlier.end < call.end), batch)
        for among in (whole, weighty)
        for call in reversed(whole)
        if keepable(batch)(call) and call.end >= weighty[0].end
    )
    return next(filter(right, singles), None)


def whole_calls(calls: Sequence[Call]) -> list[Call]:
    """The outermost calls that end before anything that trains begins."""
    boundary = min((call.start for call in calls if _trains(call.module)), default=0)
    return [
        call for call in calls if 0 < call.end < boundary and call.parent is not None and call.parent.end > boundary
    ]


def _with_least(among: Sequence[Call], batch: int, right: Callable[[Cut], bool]) -> Cut:
    """Skip what can be skipped of `among`, which is right with nothing skipped."""
    places = [place for place, call in enumerate(among) if keepable(batch)(call)]
    low, high = 0, places[-1]
    while low < high:  # what may be skipped up to some place may be skipped up to any before it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if right(_given_from(among, middle, batch)) else (low, middle - 1)
    cut = _given_from(among, low, batch)
    for call in among[low:]:
        given = tuple(other for other in cut.given if other is not call)
        less = Cut(given, (*cut.skipped, call), batch)
        if given and right(less):
            cut = less
    return cut


def _given_from(among: Sequence[Call], place: int, batch: int) -> Cut:
    """Everything before `place` is skipped, what can be given of the rest is, and what cannot runs."""
    return Cut(tuple(filter(keepable(batch), among[place:])), tuple(among[:place]), batch)


def keepable(batch: int) -> Callable[[Call], bool]:
    """Whether a call's output can be kept by sample: each of its tensors has a row for each, and was not written to
    after the module had given it.
    """

    def check(call: Call) -> bool:
        tensors = list(tensors_in(call.output))
        fit = all(tensor.dim() and tensor.shape[0] == batch for tensor in tensors)
        return bool(tensors) and fit and versions_of(tensors) == call.versions

    return check


@contextmanager
def replayed(cut: Cut, leaves: Sequence[Tensor], batch: int) -> Iterator[Callable[[], bool]]:
    """Within it, the model's next pass skips what the cut skips and takes what it is given from `leaves`.

    Yields what says, after the pass, whether it asked for all of that. One that did not, as where layers are left out
    at random, gave nothing that can be used.
    """
    answers = cut.answers(leaves, batch)
    before = {module: module.__dict__.get("forward") for module in answers}
    answering = [_Answering(module.forward, known) for module, known in answers.items()]
    for module, answer in zip(answers, answering, strict=True):
        # Not by setattr, which looks for parameters and submodules of that name first.
        module.__dict__["forward"] = answer
    try:
        yield lambda: all(each.asked for each in answering)
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


class _Answering:
    """Takes the place of a module's forward for one pass: gives known answers and computes the others."""

    def __init__(self, forward: Callable[..., Any], known: dict[int, Any]) -> None:
        self._forward = forward
        self._known = known
        self._calls = 0

    @property
    def asked(self) -> bool:
        """Whether all that is known has been asked for."""
        return self._calls > max(self._known)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nth, self._calls = self._calls, self._calls + 1
        return self._known[nth] if nth in self._known else self._forward(*args, **kwargs)


def uncompiled(hook: _Hook) -> _Hook:
    """A hook that `torch.compile` leaves as it is: it deals with ids, and would be compiled anew for each batch."""
    # Only where something compiles already, since to import that takes a second.
    if "torch._dynamo" not in sys.modules:
        return hook
    return cast(_Hook, partial(_uncompiled_call(), hook))


@cache
def _uncompiled_call() -> Callable[..., Any]:
    """Calls a hook, out of sight of `torch.compile`; made once, since that takes longer than a small network's pass."""

    def call(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return cast(Callable[..., Any], torch.compiler.disable(call))  # type: ignore[no-untyped-call]


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each of these tensors has been written to."""
    return tuple(tensor._version for tensor in tensors)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _stand_in(output: Any, batch_then: int, batch_now: int) -> Any:
    """An output of the same shape, without the memory. Its values are NaN, which no model hides if it uses them."""

    def alike(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if shape and shape[0] == batch_then:
            shape[0] = batch_now
        value = float("nan") if leaf.is_floating_point() else 0
        return torch.full((), value, dtype=leaf.dtype, device=leaf.device).expand(shape)

    return _map(output, alike)


def _filled(output: Any, leaves: Iterable[Tensor] | None = None) -> Any:
    """An output of the same structure, with the next of `leaves` for each tensor, or with its own."""
    rest = iter(leaves) if leaves is not None else None
    return _map(output, lambda leaf: next(rest) if rest is not None and isinstance(leaf, Tensor) else leaf)


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    return tree_map(function, tree)

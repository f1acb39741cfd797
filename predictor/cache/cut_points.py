"""Where a model's frozen prefix can be cut off: the module calls of a pass, and a pass with some of them left out."""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import get_ident
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from predictor.cache.arguments import CONSTANTS
from predictor.cache.side_effects import Draws
from predictor.cache.stand_ins import Compute, Skipped
from predictor.layers.isolated_pass import in_isolated_pass
from predictor.layers.tensors import number_of, tensors_in

Key: TypeAlias = "tuple[str, int]"
"""A module's name, and how often it had been called before in the pass."""
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
    """Index among all starts and ends of calls."""
    end: int = -1
    output: Any = None
    versions: tuple[int, ...] = ()
    """How often each of the output's tensors had been written to when the call ended."""
    form: "OutputForm | None" = None
    """How the output depends on the number of samples; None where that is unknown."""
    drew: bool = False
    """Whether the pass had drawn random numbers when the call ended."""
    shares: bool = False
    """Whether what it returned shares memory with something that there was before it, or in itself. It is not skipped:
    what is written to one of them is written to the other."""

    @property
    def key(self) -> Key:
        """What identifies this call in other passes of the model."""
        return self.name, self.nth


@torch.no_grad()
def trace_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Call], Any]:
    """Run one forward pass. Returns all module calls in the order of their starts, outputs kept, and the result."""
    calls: list[Call] = []
    stack: list[Call] = []
    counts: dict[nn.Module, int] = defaultdict(int)
    clock = 0
    draws = Draws(model)
    since = {number_of(tensor): 0 for tensor in tensors_in((args, kwargs))}  # when memory was first returned

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
        call.drew = bool(draws)
        numbers = [number_of(tensor) for tensor in tensors_in(output)]
        call.shares = len(set(numbers)) < len(numbers) or any(since.get(n, clock) < call.start for n in numbers)
        for number in numbers:
            since.setdefault(number, clock)

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, result


class TensorForm(NamedTuple):
    """The shape of a tensor as a function of the number of samples: `base + slope * samples` in each dimension."""

    base: tuple[int, ...]
    slope: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]
    """The dimensions in the order in which they lie in memory."""

    @property
    def batch_dim(self) -> int | None:
        """The dimension with one row a sample, where there is exactly one such and no other depends on the batch."""
        dims = [dim for dim, slope in enumerate(self.slope) if slope]
        return dims[0] if len(dims) == 1 and self.slope[dims[0]] == 1 and self.base[dims[0]] == 0 else None

    def shape(self, batch: int) -> list[int]:
        """The shape for so many samples."""
        return [base + slope * batch for base, slope in zip(self.base, self.slope, strict=True)]

    def on_meta(self, batch: int) -> Tensor:
        """A tensor of this form on the device "meta"."""
        return torch.empty_permuted(self.shape(batch), self.order, dtype=self.dtype, device="meta")

    def like(self, batch: int) -> Tensor:
        """A tensor of this form without the memory. Its values are NaN, which show in a result that depends on them."""
        shape = self.shape(batch)
        value = float("nan") if self.dtype.is_floating_point else 0
        return torch.full((), value, dtype=self.dtype, device=self.device).expand(shape)


class OutputForm(NamedTuple):
    """What a call returns: the structure, with a TensorForm for each tensor and everything else as it is."""

    leaves: list[Any]
    spec: TreeSpec

    @property
    def batch_dims(self) -> list[int] | None:
        """The batch dimension of each tensor; None where one has none, or where there is none or another object."""
        dims = [form.batch_dim for form in self.tensors]
        return cast(list[int], dims) if self.is_plain and dims and None not in dims else None

    @property
    def is_plain(self) -> bool:
        """Whether it holds tensors and constants alone. What another object holds may belong to one batch."""
        return all(isinstance(leaf, (TensorForm, *CONSTANTS)) for leaf in self.leaves)

    def rows(self, output: Any) -> list[Tensor] | None:
        """The tensors of an output with the samples first; None for an output of another form."""
        tensors, dims = list(tensors_in(output)), self.batch_dims
        if dims is None or [tensor.dim() for tensor in tensors] != [len(form.base) for form in self.tensors]:
            return None
        return [tensor.movedim(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]

    def filled(self, rows: Iterator[Tensor]) -> Any:
        """An output of this form from the next of `rows`, which have the samples first."""

        def moved(form: TensorForm) -> Tensor:
            row, dim = next(rows), cast(int, form.batch_dim)
            # Code behind the cut may need the memory order that the module's own output has.
            return row if dim == 0 else row.movedim(0, dim).contiguous()

        return self._made(moved)

    @property
    def tensors(self) -> list[TensorForm]:
        """The forms of its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorForm)]

    def made_of(self, tensors: Iterable[Tensor]) -> Any:
        """An output of this form that holds these tensors."""
        rest = iter(tensors)
        return self._made(lambda _: next(rest))

    def _made(self, tensor_of: Callable[[TensorForm], Tensor]) -> Any:
        leaves = [tensor_of(leaf) if isinstance(leaf, TensorForm) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


def form_of(output: Any, batch: int, other: Any, other_batch: int) -> OutputForm | None:
    """The form of a call's output, from its outputs for two numbers of samples; None where they do not go together."""
    leaves, spec = tree_flatten(output)
    others, other_spec = tree_flatten(other)
    if spec != other_spec:
        return None
    forms: list[Any] = []
    for leaf, less in zip(leaves, others, strict=True):
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, CONSTANTS) and leaf != less:
                return None
            forms.append(leaf)
            continue
        if not isinstance(less, Tensor) or leaf.dim() != less.dim():
            return None
        steps = [divmod(a - b, batch - other_batch) for a, b in zip(leaf.shape, less.shape, strict=True)]
        if any(rest for _, rest in steps):
            return None
        slope = tuple(step for step, _ in steps)
        base = tuple(size - step * batch for size, step in zip(leaf.shape, slope, strict=True))
        strides = [stride if size > 1 else 0 for stride, size in zip(leaf.stride(), leaf.shape, strict=True)]
        order = tuple(sorted(range(leaf.dim()), key=strides.__getitem__, reverse=True))
        forms.append(TensorForm(base, slope, leaf.dtype, leaf.device, order))
    return OutputForm(forms, spec)


@dataclass(frozen=True)
class Cut:
    """A pass with the frozen prefix left out: what it is given and what it skips. Modules in neither run as usual."""

    given: tuple[Call, ...]
    """Calls whose outputs are given: one, or several where a connection leads around the last of them."""
    skipped: tuple[Call, ...]
    """Calls that are answered with a stand-in, since nothing depends on what they return."""

    @property
    def name(self) -> str:
        """The foremost module whose output is given."""
        return self.given[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """All modules whose outputs are given, in the order of the pass."""
        return tuple(call.name for call in self.given)

    def rows(self, outputs: Sequence[Any]) -> list[Tensor] | None:
        """The tensors of what the given calls returned, samples first; None where one has another form than ever."""
        rows: list[Tensor] = []
        for call, output in zip(self.given, outputs, strict=True):
            own = None if call.form is None else call.form.rows(output)
            if own is None:
                return None
            rows += own
        return rows

    def answers(
        self, rows: Iterable[Tensor], batch: int, compute: Compute | None
    ) -> "tuple[dict[nn.Module, dict[int, _Answer]], Skipped]":
        """What each module answers to each of its calls that are left out, and what is skipped of them."""
        answers: dict[nn.Module, dict[int, _Answer]] = defaultdict(dict)
        forms = [[] if call.form is None else call.form.tensors for call in self.skipped]
        like = [[form.like(batch) for form in each] for each in forms]
        skipped = Skipped(like, compute)
        for number, call in enumerate(self.skipped):
            assert call.form is not None
            eager = partial(_standing_for, skipped, number, call.form, batch)
            answers[call.module][call.nth] = _Answer(eager, call.form.made_of(like[number]))
        rest = iter(rows)
        for call in self.given:
            assert call.form is not None
            output = call.form.filled(rest)
            answers[call.module][call.nth] = _Answer(partial(_same, output), output)
        return answers, skipped

    def forget_values(self) -> None:
        """Keep the forms of what the modules returned and free the values."""
        for call in (*self.given, *self.skipped):
            call.output = call.parent = None


class _Answer(NamedTuple):
    """What a call that is left out returns."""

    eager: Callable[[], Any]
    """Makes it, when it is asked for."""
    compiled: Any
    """The same in compiled code, which cannot ask what is read: NaN, and zeros for whole numbers."""


def _standing_for(skipped: Skipped, number: int, form: OutputForm, batch: int) -> Any:
    devices = [each.device for each in form.tensors]
    return form.made_of(skipped.stand_ins(number, [each.on_meta(batch) for each in form.tensors], devices))


def _same(output: Any) -> Any:
    return output


class Replay(NamedTuple):
    """A pass with a cut."""

    asked: Callable[[], bool]
    """Whether, after the pass, it has asked for all that the cut skips and is given."""
    skipped: Skipped
    """What it skips."""


@contextmanager
def replayed(
    cut: Cut, rows: Sequence[Tensor], batch: int, compute: Compute | None = None, compiled: bool = False
) -> Iterator[Replay]:
    """Within it, the model's next pass skips what the cut skips and takes what it is given from `rows`.

    Discard the result of a pass that did not ask for all of that, as when layers are left out at random.

    compute: gives what the skipped calls return, where something reads it; by default that is NaN. compiled: whether
    compiled code may get what they return.
    """
    answers, skipped = cut.answers(rows, batch, compute)
    before = {module: module.__dict__.get("forward") for module in answers}
    answering = [_Answering(module.forward, known, compiled) for module, known in answers.items()]
    for module, answer in zip(answers, answering, strict=True):
        # Not by setattr, which looks for parameters and submodules of that name first.
        module.__dict__["forward"] = answer
    try:
        yield Replay(lambda: all(each.asked for each in answering), skipped)
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


class _Answering:
    """Takes the place of a module's forward for one pass: returns known answers and computes the others."""

    def __init__(self, forward: Callable[..., Any], known: dict[int, _Answer], compiled: bool) -> None:
        self._forward = forward
        self._known = known
        self._compiled = compiled
        self._calls = 0
        self._thread = get_ident()
        self._isolated = in_isolated_pass()

    @property
    def asked(self) -> bool:
        """Whether every known answer has been asked for."""
        return self._calls > max(self._known)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        # Another thread makes another pass. Compiled code, which cannot ask for the thread, is not shared.
        if not compiling and (get_ident() != self._thread or in_isolated_pass() != self._isolated):
            return self._forward(*args, **kwargs)
        nth, self._calls = self._calls, self._calls + 1
        if nth not in self._known:
            return self._forward(*args, **kwargs)
        return self._known[nth].compiled if compiling or self._compiled else self._known[nth].eager()


def at_call(nth: int, act: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that passes on the output of the module's call number `nth`.

    One for the training's pass leaves out the library's own within it, as for counting FLOPs.
    """
    calls, isolated = itertools.count(), in_isolated_pass()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if in_isolated_pass() == isolated and next(calls) == nth:
            act(output)

    return hook


def uncompiled(hook: _Hook) -> _Hook:
    """A hook that `torch.compile` leaves alone: it handles ids, and would be compiled anew for each batch."""
    # Only where something compiles already, since that import takes a second.
    if "torch._dynamo" not in sys.modules:
        return hook
    return cast(_Hook, partial(_uncompiled_call(), hook))


@cache
def _uncompiled_call() -> Callable[..., Any]:
    """Calls a hook out of sight of `torch.compile`; made once, since that takes longer than a small network's pass."""

    def call(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    return cast(Callable[..., Any], torch.compiler.disable(call))  # type: ignore[no-untyped-call]


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each of these tensors has been written to."""
    return tuple(tensor._version for tensor in tensors)

"""Where a model's frozen front can be cut off: its calls in order, and running it with the front left out."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


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
    """Everything before it is skipped; its own output is given."""

    at: Call
    skipped: tuple[Call, ...]
    batch: int
    """Samples in the pass that it was found in: the size of the dimension that follows the batch."""

    def leaves(self) -> list[Tensor] | None:
        """The tensors of the cut's output, or None where they cannot be kept.

        That is where one of them has no row for each sample, or was written to after the module had given it.
        """
        tensors = _tensors(self.at.output)
        fit = all(tensor.dim() and tensor.shape[0] == self.batch for tensor in tensors)
        return tensors if tensors and fit and _versions(tensors) == self.at.versions else None

    def forget_values(self) -> None:
        """Keep the shapes of what the modules gave and let the values go."""
        for call in (self.at, *self.skipped):
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
        call.end, call.output, call.versions = clock, output, _versions(_tensors(output))

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, result


def candidates(calls: Sequence[Call], batch: int) -> Iterator[Cut]:
    """Cuts that a frozen front allows, the ones that skip most first. Whether one is right, only a pass can tell.

    The front ends where the first module begins that holds a parameter that trains. A module that ends before that,
    whose parent does not, can be left out as a whole. Modules without parameters are left out in the first round and
    run in the second: what they give may be needed all along, as rotary position embeddings are.
    """
    boundary = min((call.start for call in calls if _trains(call.module)), default=0)
    whole = [
        call for call in calls if 0 < call.end < boundary and call.parent is not None and call.parent.end > boundary
    ]
    for keep_running in (False, True):
        for place in range(len(whole) - 1, -1, -1):
            before = whole[:place]
            if keep_running:
                before = [call for call in before if any(True for _ in call.module.parameters())]
            if any(True for call in [*before, whole[place]] for _ in call.module.parameters()):
                yield Cut(whole[place], tuple(before), batch)


@contextmanager
def replayed(cut: Cut, leaves: Sequence[Tensor], batch: int) -> Iterator[None]:
    """Within it, the model's next pass skips what is before the cut and takes the cut's output from `leaves`."""
    answers: dict[nn.Module, dict[int, Any]] = defaultdict(dict)
    for call in cut.skipped:
        answers[call.module][call.nth] = _stand_in(call.output, cut.batch, batch)
    answers[cut.at.module][cut.at.nth] = _filled(cut.at.output, leaves)
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, known in answers.items():
        module.forward = _Answering(module.forward, known)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


class _Answering:
    """Takes the place of a module's forward for one pass: gives known answers and computes the others."""

    def __init__(self, forward: Callable[..., Any], known: dict[int, Any]) -> None:
        self._forward = forward
        self._known = known
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nth, self._calls = self._calls, self._calls + 1
        return self._known[nth] if nth in self._known else self._forward(*args, **kwargs)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
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


def _filled(output: Any, leaves: Sequence[Tensor]) -> Any:
    rest = iter(leaves)
    return _map(output, lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf)


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    return tree_map(function, tree)

"""One place where a model's front is cut off, and the features kept there."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from predictor.cache.cut_points import Call, Cut, replayed, uncompiled, versions_of
from predictor.cache.store import FeatureStore
from predictor.errors import UsageError
from predictor.layers.tensors import tensors_in

_TOLERANCE = 1e-5
_SUMMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEFT_OUT = "parts of the frozen front are left out of some passes in training, as by LayerDrop"


class Level:
    """A cut and the features there."""

    def __init__(self, cut: Cut, store: FeatureStore, expected: list[Tensor], frozen: frozenset[int]) -> None:
        self.cut = cut
        self.store = store
        self.frozen = frozen
        self.used = False
        """Whether a pass has begun here."""
        self._expected = expected  # what the first batch gave in evaluation mode, until it was compared
        front = [parameter for call in (*cut.given, *cut.skipped) for parameter in call.module.parameters()]
        self._front = [parameter for parameter in front if parameter.dtype in _SUMMED]
        self._versions, self._sums = versions_of(self._front), _sums(self._front)

    @property
    def proved(self) -> bool:
        """Whether a pass in training has given the features that one in evaluation mode gave."""
        return not self._expected

    def outdated(self) -> bool:
        """Whether the front's weights are others now, as after loading a checkpoint.

        They are looked at where they have been written to, which an average of weights does that stands in for them
        while a model is tested, and they come back as they were.
        """
        versions = versions_of(self._front)
        if versions == self._versions:
            return False
        self._versions = versions
        return _sums(self._front) != self._sums

    @contextmanager
    def kept(self, ids: list[int], prints_B: Tensor, give_up: Any) -> Iterator[None]:
        """Within it, the next pass's outputs at the cut are stored."""
        outputs: dict[int, Any] = {}
        end = max(call.end for call in self.cut.given)
        coming = [call for call in self.cut.skipped if call.end < end]
        came: list[Any] = []

        def keep(place: int, output: Any) -> None:
            if _checkpointed():
                give_up(
                    "the front ends inside a part of the model whose activations are checkpointed, and the backward "
                    "pass computes that once more, from its start"
                )
                return
            outputs[place] = output
            if len(outputs) == len(self.cut.given):
                if len(came) < len(coming):
                    give_up(_LEFT_OUT)
                    return
                leaves = [outputs[place] for place in range(len(outputs))]
                self._store(ids, list(tensors_in(leaves)), prints_B, give_up)

        def come(_: Any) -> None:
            came.append(None)

        acts: list[tuple[Call, Callable[[Any], None]]] = [(call, come) for call in coming]
        acts += [(call, partial(keep, place)) for place, call in enumerate(self.cut.given)]
        with ExitStack() as hooks:
            for call, act in acts:
                hook = uncompiled(at_call(call.nth, act))
                hooks.callback(call.module.register_forward_hook(hook).remove)
            yield

    def replay(self, stack: ExitStack, model: nn.Module, leaves: Sequence[Tensor], batch: int, give_up: Any) -> None:
        """Arrange that the model's next pass begins here; it is made once more, whole, where that gave nothing."""
        asked = stack.enter_context(replayed(self.cut, leaves, batch))

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if asked():
                return output
            stack.close()
            give_up(_LEFT_OUT)
            return module.forward(*args, **kwargs)

        handle = model.register_forward_hook(uncompiled(check), prepend=True, with_kwargs=True)
        stack.callback(handle.remove)

    def state_dict(self) -> dict[str, Any]:
        """Where the cut is, and all that is kept there."""
        given, skipped = ([[call.name, call.nth] for call in calls] for calls in (self.cut.given, self.cut.skipped))
        place = {"given": given, "skipped": skipped, "frozen": sorted(self.frozen)}
        return {**place, "used": self.used, "store": self.store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the features of a level at the same cut."""
        self.store.load_state_dict(state["store"])
        self.used = state["used"]
        self._expected = []

    def _store(self, ids: list[int], leaves: list[Tensor], prints_B: Tensor, give_up: Any) -> None:
        if not self.store.fits([*leaves, prints_B]):
            return  # another length or precision than the first batch's: this one is not kept
        if self._expected and not same(self._expected, leaves):
            give_up(
                "the frozen front gives other features in training than in evaluation: something in it is still in "
                "training mode, such as dropout or BatchNorm outside the frozen layers"
            )
            return
        self._expected = []
        try:
            self.store.put(ids, [*leaves, prints_B])
        except OSError as error:
            give_up(f"features could not be kept: {error.strerror}")


def cut_again(calls: Sequence[Call], state: dict[str, Any], batch: int) -> Cut:
    """The cut of a level's state, among the calls of a pass on `batch` samples.

    Raises UsageError where the pass has no such calls, as that of another model.
    """
    known = {(call.name, call.nth): call for call in calls}
    given, skipped = ([(name, nth) for name, nth in state[part]] for part in ("given", "skipped"))
    odd = next((name for name, nth in (*given, *skipped) if (name, nth) not in known), None)
    if odd is not None:
        raise UsageError(f"this state is of a model that calls its module {odd!r}, which this one does not")
    return Cut(tuple(known[place] for place in given), tuple(known[place] for place in skipped), batch)


def same(first: Any, second: Any) -> bool:
    """Whether two outputs hold the same numbers; not, where they hold none that could be compared."""
    leaves = zip(tree_leaves(first), tree_leaves(second), strict=True)
    pairs = [(a, b) for a, b in leaves if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
    return bool(pairs) and all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(a.abs().max())) for a, b in pairs
    )


@torch.no_grad()
def _sums(parameters: Sequence[Tensor]) -> list[float]:
    """The sum and the norm of each: other weights have others."""
    sums = [parameter.sum(dtype=torch.float32) for parameter in parameters]
    norms = [torch.linalg.vector_norm(parameter, dtype=torch.float32) for parameter in parameters]
    return torch.stack([number.cpu() for number in (*sums, *norms)]).tolist() if parameters else []


def _checkpointed() -> bool:
    """Whether what is computed now is within `torch.utils.checkpoint`, which torch does not tell in public."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "checkpoint" in hooks[0].__qualname__


def at_call(nth: int, act: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that passes on the output of the module's call number `nth`."""
    calls = itertools.count()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if next(calls) == nth:
            act(output)

    return hook

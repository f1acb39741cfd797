"""The cuts in use and the features kept there: the newest cut, and the one that it is filled from."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import currentframe
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from predictor.cache.arguments import Inputs, changed
from predictor.cache.cut_points import Call, Cut, at_call, replayed, uncompiled
from predictor.cache.cut_search import close, look_passes, prefix_outputs, repeated, rounding
from predictor.cache.payoff import Timing
from predictor.cache.side_effects import Draws
from predictor.cache.stand_ins import Skipped
from predictor.cache.store import FeatureStore
from predictor.cache.watch import Watch
from predictor.layers.tensors import tensors_in
from predictor.policies.base import View

_MUCH_LARGER = 1.5
_COARSE = {"full": 0.0, "half": 2e-3, "int8": 2e-2}
"""By what share of the largest number kept features may be off."""
_TRIED = 2
"""Samples on which features are checked after a while."""
_ROUNDS = 2
"""How often all samples may be checked in a row, without a batch between that needs it no more."""
LEFT_OUT = "parts of the frozen prefix are left out of some passes in training, as by LayerDrop"
_DRAWS = (
    "the frozen prefix may give other features in training than in evaluation, and in each pass: random numbers are "
    "drawn for them"
)
_TRAINED = "features hang on weights that train, which the model reads without a call of their module"


class Level:
    """A cut and the features there.

    Args:
        cut: where the model is cut.
        store: for the features, and a fingerprint of each sample.
        expected: the features of the first batch in evaluation mode, to be compared with those in training.
        frozen: the layers that were frozen when the cut was found.
        watch: on what the features depend on besides their samples.
        give_up: is called with the reason if the features turn out to be unusable.
    """

    def __init__(
        self,
        cut: Cut,
        store: FeatureStore,
        expected: list[Tensor],
        frozen: frozenset[int],
        watch: Watch,
        give_up: Callable[[str], None],
    ) -> None:
        self.cut = cut
        self.store = store
        self.frozen = frozen
        self.watch = watch
        self.used = False
        """Whether a pass has begun here."""
        self._uses = 0
        self._expected = expected
        self._give_up = give_up
        self._sure: set[int] | None = None  # samples seen since something has changed; None where nothing has
        self._changed = ""
        self._in_doubt = 0  # samples in a row of batches that were checked since something had changed
        self._seen: set[int] = set()
        self._shown = False  # whether a pass has shown which weights the features hang on

    @property
    def proved(self) -> bool:
        """Whether a pass in training has given the features that one in evaluation mode gave."""
        return not self._expected

    def changed(self, names: Sequence[str]) -> None:
        """What has these names is not what it was: each sample is to be seen again before it is used."""
        self._sure, self._changed = set(), names[0]

    def sure_of(self, ids: Iterable[int]) -> bool:
        """Whether these samples have been seen since something changed."""
        return self._sure is None or self._sure.issuperset(ids)

    def due_for_a_check(self, ids: Sequence[int]) -> list[int]:
        """Count a pass that is to begin here. On which samples to check its features: their indices.

        On all of the first batch, which are together for the first time. On those that have not been seen since
        something changed. Else on a few: at powers of two, so seldom soon, and where samples begin to come once more,
        as in a new epoch.
        """
        self._uses += 1
        again = 2 * len(self._seen) >= len(self.store) and not self._seen.isdisjoint(ids)
        if again:
            self._seen.clear()
        self._seen.update(ids)
        sure = ids if self._sure is None else self._sure
        in_doubt = [] if sure is ids else [index for index, i in enumerate(ids) if i not in sure]
        self._in_doubt = self._in_doubt + len(in_doubt) if in_doubt else 0
        if self._uses == 1 or in_doubt:
            return in_doubt or list(range(len(ids)))
        return list(range(min(_TRIED, len(ids)))) if again or self._uses & (self._uses - 1) == 0 else []

    @property
    def changes_too_often(self) -> str:
        """The name of what changes so often that features are checked as often as they are used; or empty."""
        return self._changed if self._in_doubt > _ROUNDS * len(self.store) else ""

    def note_seen(self, ids: Iterable[int]) -> None:
        """Features of these samples are those of now."""
        if self._sure is not None:
            self._sure.update(ids)
            self._sure = None if len(self._sure) >= len(self.store) else self._sure

    def agrees(self, ids: list[int], outputs: list[Any], prints_B: Tensor) -> tuple[bool, str]:
        """Whether the store holds what the calls at the cut returned for these samples, but for rounding.

        And, where it does not, which sample is not what it was, in words.
        """
        rows = self.cut.rows(outputs)
        *kept, then_B = self.store.get(ids)
        coarse = _COARSE[self.store.precision]
        # Together, since each comparison waits for a GPU.
        if rows and close([*kept, then_B], [*rows, prints_B], lambda row: max(coarse, rounding(row))):
            return True, ""
        return False, changed(ids, prints_B, then_B)

    @contextmanager
    def kept(self, model: nn.Module, ids: list[int], prints_B: Tensor, timing: Timing | None = None) -> Iterator[None]:
        """Within it, the model's next pass's outputs at the cut are stored."""
        draws = Draws(model)
        outputs: dict[int, Any] = {}
        end = max(call.end for call in self.cut.given)
        coming = [call for call in self.cut.skipped if call.end < end]
        came: list[Any] = []

        def keep(index: int, output: Any) -> None:
            if _checkpointed():
                self._give_up(
                    "the frozen prefix ends inside a part of the model whose activations are checkpointed, and the "
                    "backward pass computes that once more, from its start"
                )
                return
            outputs[index] = output
            if len(outputs) == len(self.cut.given):
                fault = LEFT_OUT if len(came) < len(coming) else _DRAWS if draws else self._trained(model, outputs)
                if fault:
                    self._give_up(fault)
                    return
                since = None if timing is None else timing.mark()
                self.keep(ids, [outputs[index] for index in range(len(outputs))], prints_B)
                if timing is not None:
                    timing.stored(since)

        acts: list[tuple[Call, Callable[[Any], None]]] = [(call, came.append) for call in coming]
        acts += [(call, partial(keep, index)) for index, call in enumerate(self.cut.given)]
        with ExitStack() as hooks:
            for call, act in acts:
                hook = uncompiled(at_call(call.nth, act))
                hooks.callback(call.module.register_forward_hook(hook).remove)
            yield

    def keep(self, ids: list[int], outputs: list[Any], prints_B: Tensor) -> None:
        """Store what the calls at the cut returned for these samples. Other lengths and types are not kept."""
        rows = self.cut.rows(outputs)
        if rows is None or not self.store.fits([*rows, prints_B]):
            return
        compiled = "torch._dynamo" in sys.modules  # whose kernels round in other places
        if self._expected and not close(self._expected, rows, rounding if compiled else repeated):
            self._give_up(
                "the frozen prefix gives other features in training than in evaluation: something in it is still in "
                "training mode, such as dropout or BatchNorm outside the frozen layers"
            )
            return
        self._expected = []
        try:
            self.store.put(ids, [*rows, prints_B])
        except (OSError, RuntimeError, MemoryError) as error:  # the disk, the GPU or the memory is full
            self._give_up(f"features could not be kept: {getattr(error, 'strerror', None) or error}")
            return
        self.note_seen(ids)

    def _trained(self, model: nn.Module, outputs: dict[int, Any]) -> str:
        """Why features must not be kept: weights that train lead to them. Empty where none do."""
        if self._shown or not torch.is_grad_enabled():
            return ""
        self._shown = True
        trains = {id(weight) for weight in model.parameters() if weight.requires_grad}
        return _TRAINED if any(id(leaf) in trains for leaf in leaves_of(tensors_in(outputs))) else ""

    def replay(
        self, stack: ExitStack, model: nn.Module, rows: Sequence[Tensor], batch: int, inputs: Callable[[], Inputs]
    ) -> Skipped:
        """Arrange that the model's next pass begins here. Where it does not ask for `rows`, it is made again, whole.

        inputs: arguments of that pass, for what it skips and reads all the same. Returns what it skips.
        """
        rest = Cut(self.cut.skipped, ())
        compute = lambda: prefix_outputs(model, rest, inputs(), modes=True, copies=True)  # noqa: E731
        asked, skipped = stack.enter_context(replayed(self.cut, rows, batch, compute, _has_compiled_parts(model)))

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if asked():
                return output
            stack.close()
            self._give_up(LEFT_OUT)
            return module.forward(*args, **kwargs)

        handle = model.register_forward_hook(uncompiled(check), prepend=True, with_kwargs=True)
        stack.callback(handle.remove)
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Where the cut is, and all that is kept there."""
        given, skipped = ([list(call.key) for call in calls] for calls in (self.cut.given, self.cut.skipped))
        cut = {"given": given, "skipped": skipped, "frozen": sorted(self.frozen)}
        return {**cut, "used": self.used, "uses": self._uses, "store": self.store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the features of a level at the same cut."""
        self.store.load_state_dict(state["store"])
        self.used, self._uses = state["used"], state.get("uses", 0)
        self._expected = []
        self._sure = set()  # what features depend on may be other than when they were kept


class Levels(list[Level]):
    """None, one, or two of them, the newest last."""

    @property
    def bytes(self) -> int:
        """Bytes of features kept, in memory and on the disk."""
        return sum(level.store.bytes for level in self)

    @property
    def device_bytes(self) -> int:
        """Bytes reserved for them on the model's device."""
        return sum(level.store.device_bytes for level in self)

    @property
    def exact_bytes(self) -> int:
        """Bytes that features of the same samples would take as they were computed, each kept once."""
        return sum(level.store.exact_bytes for level in self)

    def add(self, level: Level) -> None:
        """Take a new level, to be filled from that with most samples: a prefix may grow before one is complete."""
        fullest = max(reversed(self), key=lambda old: len(old.store), default=None)
        self[:] = [level] if fullest is None else [fullest, level]

    def use_newest(self) -> None:
        """A pass begins at the newest level, so the older one may no longer be needed."""
        self[-1].used = True
        if len(self) == 2 and len(self[-1].store) >= len(self[0].store):
            del self[0]

    def worth_a_cut(self, frozen: frozenset[int], batch: int, view: View) -> bool:
        """Whether a prefix that has grown to these layers should be cut anew, which takes some passes forward.

        Two conditions hold. The features at the newest cut have been used, or the prefix is half as large again. And
        the remaining passes of the training save more than looking for a cut costs. A pass is assumed to save the
        new layers' share of the model, from when each sample has come once more.
        """
        if not self:
            return True
        newest = self[-1]
        if not newest.used and len(frozen) < _MUCH_LARGER * len(newest.frozen):
            return False
        spared = (len(frozen) - len(newest.frozen)) / len(view.layers)
        epoch = max(len(level.store) for level in self) / batch
        return spared * (view.total_steps - view.step - epoch) >= look_passes(batch)

    def holding(self, ids: Sequence[int], before: Level | None = None) -> Level | None:
        """The furthest level that holds all of these samples; of those before another one, where that is given.

        A pass that begins at a level skips all that lies before it, so nothing can be kept there.
        """
        there = self if before is None else self[: self.index(before)]
        return next((level for level in reversed(there) if level.store.holds(ids)), None)

    def holding_most(self, ids: Sequence[int]) -> Level | None:
        """The furthest level that holds half of these samples or more, and was proved right."""
        few = (level for level in reversed(self) if 2 * len(level.store.absent(ids)) <= len(ids))
        return next((level for level in few if level.proved), None)


def leaves_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors with gradients of their own that others were computed from."""
    nodes = []
    for tensor in tensors:
        if tensor.grad_fn is None:
            yield tensor
        else:
            nodes.append(tensor.grad_fn)
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        nodes += new


def _has_compiled_parts(model: nn.Module) -> bool:
    """Whether `torch.compile` has compiled the model or modules in it."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in model.modules())


def _checkpointed() -> bool:
    """Whether this is called from within `torch.utils.checkpoint`, for which torch has no public function."""
    frame = currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False

"""The feature cache: the frozen prefix's outputs are kept by sample, so that its forward pass is skipped too."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from predictor.cache.arguments import (
    NOT_WHAT_IT_WAS,
    Arguments,
    Fingerprints,
    Ids,
    Inputs,
    changed,
    checked_ids,
    named_twice,
)
from predictor.cache.call_kind import CallKind
from predictor.cache.compression import CompressedStore, Compression, precision_for
from predictor.cache.cut_points import Cut, Key, uncompiled
from predictor.cache.cut_search import READ, Search, close, find_again, find_cut, prefix_outputs, repeated
from predictor.cache.deferred import Deferred
from predictor.cache.hooks import all_are_watched
from predictor.cache.levels import LEFT_OUT, Level, Levels
from predictor.cache.payoff import Payoff, Timing, clock_for
from predictor.cache.prefetch import ReadAhead, moved_beside, with_next
from predictor.cache.stand_ins import Skipped
from predictor.cache.store import FeatureStore, Precision, index_of
from predictor.cache.watch import Attribute, StandIn, Watch
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent

_Batch = TypeVar("_Batch", bound=Sequence[Any])
_WEIGHTS, _SAMPLES = "weights", "samples"
"""What may have turned out to be others."""
_TRIED = 2
"""Samples on which features are checked where something else than a sample has changed."""
_PAYOFF_EVERY = 16
"""Hits after which it is seen whether they pay."""
_RESTARTS = 3
"""How often in a row kept features may be forgotten before they were used, and in all because of what is read."""
_READ_IN_A_ROW = 2
"""Hits that read what they skip, before another cut is looked for."""
_DEVICE_BYTES = int(2e9)
_DEVICE_SHARE = 0.1
_DEVICE_BYTES_ELSEWHERE = int(5e8)
"""What features may take of a GPU's memory by default: of a CUDA device's, this share of what is free."""


class FeatureCache:
    """Keeps the frozen prefix's outputs of each sample, and skips the prefix where they are known.

        cache = FeatureCache(controller, memory_gb=4)
        for ids, x, y in loader:                       # each sample has an id
            with cache.batch(ids):                     # a hit skips the frozen prefix; a miss runs and stores it
                loss = loss_fn(model(x), y)

    The model is not changed. Inside `batch`, on a hit, modules before the cut return a stand-in of the right shape, and
    the module at the cut returns what was stored. So do others behind it, where a connection leads around them, as in a
    residual block of which only the first layers are frozen. Where most samples of a batch are known, the prefix is run
    on the others alone. A stand-in that something reads after all is computed then, so the pass is right in any case.

    Nothing is kept before it is proved on a batch: features have one row a sample, the same in another order and in a
    smaller batch; they are the same after another batch, no random numbers are drawn for them, and nothing that trains
    leads to them; and a pass from the cut gives the model's outputs and leaves the same tensors in its modules. Of the
    cuts for which that holds, the one that skips most is used. Where there is none the cache is off, and `reason` says
    why. The first batch that would skip the prefix runs it once more, to see that its features are still the same. So
    do two samples at the second hit, the fourth and so on, and in each epoch. When a mode, a buffer or an attribute of
    a module in front has another value, each sample does once. A batch runs as if there was no cache where its
    arguments have other shapes than the first batch's, where an argument that all samples share has another value and
    features depend on it, under another autocast, and where gradients of the model's inputs are wanted.

    A prefix that grows is filled from the features at the old cut, not from the inputs. A prefix that shrinks forgets
    all. To find a cut takes passes forward, so a prefix that grows keeps its cut until another one pays
    (`Levels.worth_a_cut`). When the prefix's weights are written to, as by loading a checkpoint, all is forgotten.

    A sample's inputs must be the same each time it comes, bit for bit. Where they are not, as under random
    augmentation, the cache is off, with a warning, unless `check_inputs=False` says to use the features of the first
    time for all. An `AugmentedCache` keeps several.

    On a GPU nobody waits for these comparisons: they are read with the next batch, or the one after. So one or two
    batches are trained on features of before, with a warning, where a sample changes or weights are written to behind
    PyTorch's back (`weight.data`).

    Args:
        controller: freezes the layers.
        model: the part of the controller's model that is called within `batch`; by default the whole.
        memory_gb: the memory for features. Features beyond it go to memory-mapped files.
        device_gb: memory of the model's GPU for features, before any go to memory. By default a tenth of what is free,
            and no more than 2 GB. On a processor it means nothing.
        directory: the folder of those files; by default the system's temporary one.
        check_inputs: whether to compare each sample's inputs with those of its first time.
        compression: rounds features to fewer bytes; by default they are kept as they are. A prefix that grows is filled
            from rounded features too, but for its first batch, by which its new cut is proved.
        adaptive: whether to switch off where hits take longer than the passes they replace: once they have lost a
            second in all. Until more layers freeze.

    Raises:
        UsageError: `model` is no part of the controller's, the model is sharded (FSDP2), or `memory_gb` or `device_gb`
            is negative.
    """

    _completes = True  # whether the prefix may be run on some samples of a batch alone

    def __init__(
        self,
        controller: FreezeController,
        *,
        model: nn.Module | None = None,
        memory_gb: float = 4.0,
        directory: Path | str | None = None,
        check_inputs: bool = True,
        compression: Compression | None = None,
        device_gb: float | None = None,
        adaptive: bool = True,
    ) -> None:
        for name, value in (("memory_gb", memory_gb), ("device_gb", device_gb)):
            if value is not None and not value >= 0:
                raise UsageError(f"{name}={value}: give the gigabytes of memory to use, from 0")
        self.reason = "nothing is frozen yet"
        """Why nothing is skipped; empty while the cache works."""
        self.hits = 0
        """Batches for which the prefix was skipped, but for a few samples perhaps."""
        self.misses = 0
        """Batches for which it was run."""
        self.looked = 0
        """Samples in the passes forward that were made to find places to cut."""
        self.checked = 0
        """Samples that were run through the prefix again, to see whether what is kept of them is right."""
        self.taken: Counter[frozenset[int] | None] = Counter()
        """Samples of the last batch, by the layers that were frozen when the cut was found from whose features their
        pass began; by None, where it began from the inputs."""
        self._controller = controller
        self._model = _called_part(controller.model, model)
        self._memory_bytes, self._device_gb = int(memory_gb * 1e9), device_gb
        self._directory = directory
        self._check_inputs = check_inputs
        self._compression = compression
        self._exact = check_inputs and compression is None  # kept features are those that a pass would give again
        self._levels = Levels()
        self._call_kind = CallKind()
        self._pending: list[dict[str, Any]] = []  # states of levels whose cuts the next pass will show
        self._stale = True
        self._prints = Fingerprints()
        self._ahead = ReadAhead()
        self._following: Tensor | Iterable[int] | None = None
        self._open: list[tuple[object, int]] = []  # the batches under way, with their threads: the innermost counts
        self._begun = False
        self._restarts = self._hits_then = 0
        self._last: tuple[Cut, Skipped] | None = None  # where the last hit has begun, and what it has skipped
        self._read = 0  # hits in a row of which something was read that they had skipped
        self._needed: set[Key] = set()  # the calls of which it was read
        self._searches = 0  # for cuts, because of that
        self._suspected = False  # that weights have been written to
        self._questions: list[tuple[str, Tensor]] = []
        self._deferred = Deferred()
        self._adaptive = adaptive
        self._payoff = Payoff(lambda: clock_for(next(self._model.parameters(), torch.empty(0)).device))
        controller.on_change(self._prefix_changed)
        controller.on_moved(self.clear)

    @property
    def cut(self) -> str:
        """The name of the module whose output is kept, the foremost where several are; empty where none is."""
        return self._levels[-1].cut.name if self._levels else ""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of all modules whose outputs are kept, in the order of the pass."""
        return self._levels[-1].cut.names if self._levels else ()

    @property
    def bytes(self) -> int:
        """Bytes of features kept, in memory and on the disk."""
        return self._levels.bytes

    @property
    def exact_bytes(self) -> int:
        """Bytes that features of the same samples would take as they were computed, each kept once."""
        return self._levels.exact_bytes

    @property
    def precision(self) -> Precision | None:
        """How the features at the present cut are kept; None where there is none."""
        return self._levels[-1].store.precision if self._levels else None

    @contextmanager
    def batch(self, ids: Tensor | Iterable[int]) -> Iterator[None]:
        """Within it, call the model once, on the samples with these ids, in their order.

        ids: a whole number for each sample of the batch. Raises UsageError for anything else, and where the batch has
        another number of samples.
        """
        known = checked_ids(ids)
        token = (object(), get_ident())
        with ExitStack() as stack:

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if module is not self._model:
                    self.reason = "the model is copied for each pass, as by DataParallel: use DistributedDataParallel"
                    return
                if self._open[-1] is not token or get_ident() != token[1] or _evaluates(module):
                    return  # a pass of a batch within this one, of another thread, or of a test in between
                handle.remove()  # one pass a batch, and none of the passes made here to find a cut
                self.enter(stack, known, args, kwargs)

            self._open.append(token)
            stack.callback(self._open.remove, token)
            handle = self._model.register_forward_pre_hook(uncompiled(before), with_kwargs=True)
            stack.callback(handle.remove)
            yield
        following, self._following = self._following, None
        if following is not None:
            self.prefetch(following)

    def enter(self, stack: ExitStack, ids: Ids, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arrange for the model's pass that is about to begin on these arguments; it ends with the stack."""
        self.taken = Counter()
        timing = self._payoff.begin() if self._adaptive and self._levels else None
        arguments = Arguments(args, kwargs)
        self._first_look(ids, arguments)
        level = None
        with ExitStack() as own:
            try:
                level = self._begin(own, ids, arguments, timing)
            except (UsageError, Warning):
                raise
            except Exception as error:
                own.close()
                self._fail(error)
            stack.enter_context(own.pop_all())
        if not self._levels:
            timing = None
        self.hits += level is not None
        self.misses += level is None
        self.taken[None if level is None else level.frozen] += len(ids) - self.taken.total()
        if timing is not None:
            self._time(stack, timing, level is not None, len(ids))

    def _time(self, stack: ExitStack, timing: Timing, hit: bool, samples: int) -> None:
        """Let the pass that is about to begin end the timing."""
        if not hit:
            timing.restart()

        def ended(*_: Any) -> None:
            timing.end()
            self._payoff.add(timing, hit, samples)

        stack.callback(self._model.register_forward_hook(uncompiled(ended), prepend=True).remove)

    def ahead(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """A loader's batches, of which the first part are the ids: while one is trained on, the next is prefetched."""
        for present, following in with_next(loader):
            self._following = None if following is None else following[0]
            yield present

    def prefetch(self, ids: Tensor | Iterable[int]) -> None:
        """Read the features of these samples in the background, for the next `batch`. Call it after the last one.

        The next batch takes them where it has the same ids in the same order. This changes no number, and reads nothing
        where a sample is not known. It pays where features lie in files or go to a GPU. Errors while reading are raised
        by the next batch.
        """
        numbers = checked_ids(ids)
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        level = None if self._wants_a_cut(len(numbers)) else self._known(numbers)
        if level is not None and not level.store.device_bytes:
            self._ahead.start((level, numbers), self._fetching(level, numbers))

    def state_dict(self) -> dict[str, Any]:
        """Counts, and all features that are kept: numbers, strings, tensors, lists and dicts of them."""
        levels = self._pending or [level.state_dict() for level in self._levels]
        return {
            "hits": self.hits,
            "misses": self.misses,
            "reason": self.reason,
            "stale": self._stale,
            **self._call_kind.state_dict(),
            "prints": "exact",
            "levels": levels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result; call it after the controller's."""
        self.clear()
        self.hits, self.misses = state["hits"], state["misses"]
        self.reason, self._stale = state["reason"], state["stale"]
        self._call_kind.load_state_dict(state)
        if self._check_inputs and state.get("prints") != "exact":
            self._stale = True  # of an earlier version, whose fingerprints say too little: its features are kept anew
        else:
            self._pending = list(state["levels"])

    def clear(self) -> None:
        """Forget all features."""
        self._ahead.drop()
        self._deferred.drop()
        self._levels, self._pending, self._questions = Levels(), [], []
        self._stale = True

    def close(self) -> None:
        """Forget all features, and end the thread that reads ahead, which would go with the cache too."""
        self.clear()
        self._ahead.close()

    def _prefix_changed(self, event: FreezeEvent) -> None:
        self._ahead.drop()
        if event.unfroze:
            self.clear()
        self._stale = True
        self._payoff.forget()

    def _first_look(self, ids: Ids, arguments: Arguments) -> None:
        """Refuse ids that are not those of the samples, with the first batch of a training, whatever is frozen."""
        if self._begun or not len(ids):
            return
        self._begun = True
        rows, shapes = arguments.rows_of_all(), arguments.shapes
        # Several tensors may be put together from samples of different lengths, and one from several views of each.
        if len(shapes) == 1 and rows is not None and rows % len(ids) and not arguments.layouts(len(ids)):
            raise UsageError(
                f"the model got no tensor with {len(ids)} rows, one for each id, but shapes {shapes}: call it inside "
                "`cache.batch(ids)` on the samples that the ids name"
            )
        if rows == len(ids) and self._check_inputs:
            numbers = ids.tolist() if isinstance(ids, Tensor) else ids
            if len(set(numbers)) < len(numbers) and not arguments.fault():
                twice = named_twice(numbers, self._prints(arguments, arguments.layouts(len(ids))[0]))
                if twice:
                    raise UsageError(twice)

    def _begin(self, stack: ExitStack, ids: Ids, arguments: Arguments, timing: Timing | None) -> Level | None:
        """The level at which the pass begins; None for the inputs."""
        key, rows = self._ahead.take()  # at once: no reading goes on while features are stored
        if 0 not in self._controller.frozen or not len(ids):
            return None
        if not (self._levels or self._pending or self._stale):
            return None  # off
        numbers = self._answered(ids)
        self._note_what_was_read()
        written = self._inspect()
        if self._adaptive and self.hits % _PAYOFF_EVERY == 0 and (lost := self._payoff.lost()):
            self._give_up(f"it does not pay: {lost}")
        if not (self._levels or self._pending or self._stale):
            return None
        if all_are_watched():
            self.reason = "there is a forward hook, or a backward one, on all modules, which has to see each pass"
            return None
        reason = arguments.fault() or self._unfit(len(ids), arguments)
        if reason:
            self.reason = reason
            return None
        if self._pending:
            self._take_up(len(ids), arguments)
        if self._wants_a_cut(len(ids)):
            self._find_cut(len(ids), arguments)
        if not self._levels:
            return None
        self._note_changes(written, arguments, len(ids))
        self.reason = ""
        prints = self._prints(arguments, self._call_kind.layout)
        if self._check_inputs and (twice := named_twice(numbers, prints)):
            self._give_up(twice)
            return None
        known = self._known(numbers)
        if known is None:
            known = self._completed(numbers, prints, arguments, written)
        elif not self._checked(known, numbers, prints, arguments, written):
            return None
        elif known is not self._levels[-1]:
            known = self._completed(numbers, prints, arguments, written) or known
        if not self._levels:
            return None
        if known is not None and not self._replay(
            stack, known, numbers, prints, arguments, rows if key == (known, numbers) else None
        ):
            return None
        if known is self._levels[-1]:
            self._levels.use_newest()
        else:
            stack.enter_context(self._levels[-1].kept(self._model, numbers, prints, timing))
        if known is not None:
            self._deferred.ask(self._questions)
        self._questions = []
        return known

    def _answered(self, ids: Ids) -> list[int]:
        """The ids, read; and what the GPU has answered of the last batch."""
        for name in self._deferred.read():
            if name == _WEIGHTS:
                self._suspected = True
            elif self._levels:
                self._switch_off(
                    f"a sample of the last batches {NOT_WHAT_IT_WAS}. They were trained on features of its first time"
                )
        return ids.tolist() if isinstance(ids, Tensor) else ids

    def _inspect(self) -> bool:
        """Whether weights or buffers may have been written to, though weights are what they were."""
        suspected, self._suspected, written = self._suspected, False, False
        for level in self._levels:
            watch, differ = level.watch, level.watch.norms_differ()
            self._questions += [(_WEIGHTS, each) for each in differ if each.device.type != "cpu"]
            touched = suspected or watch.touched or any(bool(each) for each in differ if each.device.type == "cpu")
            if watch.trains:
                self._give_up("a layer in front of the cut is trained again")
                return False
            if name := watch.hooked():
                self._give_up(f"a module in front of the cut, {name}, has got a hook, which has to see each pass")
                return False
            if watch.replaced or (touched and watch.moved):
                self._weights_changed(suspected)
                return False
            written = written or touched
        return written

    def _note_changes(self, written: bool, arguments: Arguments, batch: int) -> None:
        """See what else has changed. Samples that have features are then to be seen again, each before it is used.

        Where samples need not be what they were, nothing shows whether features are: all are forgotten.
        """
        for level in self._levels:
            watch = level.watch
            if not written and not watch.odd:
                continue
            if perhaps := watch.perhaps_unread():
                watch.note_unread(perhaps, self._unread(level, perhaps, arguments, batch))
            names = watch.changes(written, numbers=self._check_inputs)  # a first pass may add counters
            if names and not self._check_inputs:
                self._begin_again(f"{names[0]} changes")
                return
            if names:
                level.changed(names)
                watch.renew_state()
            elif not self._check_inputs:
                watch.renew()

    def _unread(self, level: Level, perhaps: list[Attribute], arguments: Arguments, batch: int) -> list[Attribute]:
        """Of some attributes those that nothing in front of the cut reads: stand-ins for them change no feature."""

        def features(value: Any, some: list[Attribute]) -> list[Any]:
            inputs = arguments.rows(self._call_kind.layout, list(range(batch)))
            values = [StandIn(each.kind) if value is StandIn else value for each in some]
            changed = [(each.table, each.name, new) for each, new in zip(some, values, strict=True)]
            return prefix_outputs(self._model, level.cut, inputs, modes=True, attributes=changed)

        def are_unread(some: list[Attribute]) -> bool:
            others = [each for each in some if each.kind not in (int, float)]  # one may ask whether these are None
            trials = [(StandIn, some), *((value, others) for value in (None, True, False) if others)]
            try:
                return all(close(now, features(*trial), repeated) for trial in trials)
            except Exception:
                return False

        now = features(None, [])
        return perhaps if are_unread(perhaps) else [each for each in perhaps if are_unread([each])]

    def _weights_changed(self, used: bool) -> None:
        """Forget all features: the prefix has other weights now. used: whether a batch has been trained on old ones."""
        if used:
            warnings.warn(
                "the frozen prefix's weights have been written to behind PyTorch's back, as by `weight.data`: the last "
                "batches were trained on features of the old ones, and the feature cache begins anew",
                stacklevel=2,
            )
        self._begin_again("the frozen prefix's weights are written to")

    def _begin_again(self, what_happens: str) -> None:
        """Forget all features. what_happens: in words, for the case that it happens too often."""
        self._restarts = self._restarts + 1 if self.hits == self._hits_then else 1
        self._hits_then = self.hits
        self.clear()
        if self._restarts > _RESTARTS:
            self._give_up(f"{what_happens} again and again")

    def _checked(self, level: Level, ids: list[int], prints: Tensor, arguments: Arguments, written: bool) -> bool:
        """Whether features that the level holds may be used.

        Now and then, and where something has changed, the prefix is run to see.
        """
        if not self._check_inputs:
            return True
        absent = set(level.store.absent(ids))
        held = [index for index in range(len(ids)) if index not in absent]
        due = level.due_for_a_check([ids[index] for index in held])
        if name := level.changes_too_often:
            self._give_up(
                f"{name} changes so often that kept features are checked as often as they are used: keep a value that "
                "features do not depend on outside of the model"
            )
            return False
        some = [held[index] for index in due] or (held[:_TRIED] if written else [])
        if not some:
            return True
        if not self._agree(level, [ids[index] for index in some], prints, arguments, some):
            return False
        level.note_seen(ids[index] for index in some)
        if written:
            for each in self._levels:
                each.watch.renew()
        return True

    def _agree(self, level: Level, ids: list[int], prints: Tensor, arguments: Arguments, indices: list[int]) -> bool:
        """Whether the prefix gives what the level holds of these samples; else the cache is off."""
        self.checked += len(ids)
        outputs = prefix_outputs(self._model, level.cut, arguments.rows(self._call_kind.layout, indices), modes=True)
        agrees, fault = level.agrees(ids, outputs, _taken(prints, indices))
        if fault:
            self._switch_off(fault)
        elif not agrees and any(each.watch.moved for each in self._levels):
            self._weights_changed(used=False)
        elif not agrees:
            self._give_up(
                LEFT_OUT
                if any(output is None for output in outputs)
                else "the frozen prefix gives other features for a sample than it gave before, though its weights and "
                "inputs are the same: it depends on a state that changes while the model trains"
            )
        return agrees

    def _unfit(self, batch: int, arguments: Arguments) -> str:
        """Why what is kept is not for a pass on these arguments; empty where it is, or where nothing is kept."""
        if not self._levels and batch < 2:
            return "a batch of one sample cannot show whether features depend on other samples"
        if not self._levels and not self._pending:
            return ""
        same_features = partial(self._same_features, batch, arguments) if self._levels else None
        return self._call_kind.why_other(arguments, batch, same_features, loaded=not self._levels)

    def _same_features(self, batch: int, arguments: Arguments, then: Sequence[Any]) -> bool:
        """Whether some samples' features are the same with the shared arguments of now and those of then."""
        some = list(range(min(_TRIED, batch)))
        inputs = (arguments.rows(self._call_kind.layout, some, shared) for shared in (None, then))
        try:
            now, before = (prefix_outputs(self._model, self._levels[-1].cut, each) for each in inputs)
        except Exception:
            return False  # a length, say, that goes with the other
        return close(now, before, repeated)

    def _wants_a_cut(self, batch: int) -> bool:
        if not self._stale or batch < 2:
            return False
        return self._levels.worth_a_cut(self._controller.frozen, batch, self._controller.view)

    def _known(self, ids: list[int]) -> Level | None:
        """The furthest level that holds all of these samples."""
        return self._levels.holding(ids) if self._usable else None

    @property
    def _usable(self) -> bool:
        """Whether a pass may begin from what is kept. A pass from rounded features proves nothing of a new cut."""
        return self._exact or not self._levels or self._levels[-1].proved

    def _completed(self, ids: list[int], prints: Tensor, arguments: Arguments, written: bool) -> Level | None:
        """The furthest level that holds most of these samples, after the prefix has been run on the others."""
        level = self._levels.holding_most(ids) if self._completes and self._usable else None
        indices = [] if level is None else level.store.absent(ids)
        if level is None or not indices or not self._checked(level, ids, prints, arguments, written):
            return None
        some, prints = [ids[index] for index in indices], _taken(prints, indices)
        below = self._levels.holding(some, before=level)
        below = below if below is not None and below.sure_of(some) else None
        with ExitStack() as stack:
            if below is not None and not self._replay(stack, below, some, prints, arguments, indices=indices):
                return None
            outputs = prefix_outputs(self._model, level.cut, arguments.rows(self._call_kind.layout, indices))
            level.keep(some, outputs, prints)
        if level not in self._levels or not level.store.holds(ids):
            return None  # they could not be kept
        self.taken[None if below is None else below.frozen] += len(indices)
        return level

    def _replay(
        self,
        stack: ExitStack,
        level: Level,
        ids: list[int],
        prints: Tensor,
        arguments: Arguments,
        rows: list[Tensor] | None = None,
        indices: list[int] | None = None,
    ) -> bool:
        """Arrange for the next pass to begin from the level's features of these samples.

        Not, where a sample is not what it was; on a GPU that is seen with the next batch.

        Args:
            stack: ends it.
            level: whose features they are.
            ids: the samples.
            prints: their fingerprints of now.
            arguments: those of the model's pass.
            rows: their features, where they were read ahead.
            indices: where these samples are in the batch; by default they are all of it.
        """
        rows = self._fetching(level, ids)() if rows is None else rows
        *rows, prints_then = level.store.unpacked(moved_beside(level.store, rows))
        if self._check_inputs and prints.device.type == "cpu":
            if fault := changed(ids, prints, prints_then):
                self._switch_off(fault)
                return False
        elif self._check_inputs:
            self._questions.append((_SAMPLES, (prints != prints_then).any()))
        versions, layout = arguments.versions, self._call_kind.layout

        def inputs() -> Inputs:
            if arguments.versions != versions:
                raise RuntimeError(
                    "the model writes to its inputs, and then reads what the feature cache has skipped of the frozen "
                    "prefix, which can no longer be computed: train without the cache"
                )
            return arguments.copied() if indices is None else arguments.rows(layout, indices)

        self._last = level.cut, level.replay(stack, self._model, rows, len(ids), inputs)
        return True

    def _note_what_was_read(self) -> None:
        """Look for another cut where the model keeps reading what passes skip, which is then computed each time."""
        last, self._last = self._last, None
        if last is None:
            return
        cut, skipped = last
        skipped.settle_what_is_left()
        self._read = self._read + 1 if skipped.read else 0
        if self._read < _READ_IN_A_ROW:
            return
        self._needed.update(cut.skipped[number].key for number in skipped.read)
        self._read, self._searches = 0, self._searches + 1
        self.clear()
        if self._searches > _RESTARTS:
            self._give_up(READ)

    def _fetching(self, level: Level, ids: list[int]) -> Callable[[], list[Tensor]]:
        """What reads these samples' rows, in any thread; all that is to be chosen is chosen here."""
        return partial(level.store.fetch, ids)

    def _new_store(self, like: list[Tensor], memory_bytes: int, frozen: frozenset[int]) -> FeatureStore:
        if self._compression is None:
            return FeatureStore(like, memory_bytes, self._directory, self._device_bytes(like))
        there = self._device_bytes(like)
        return CompressedStore(like, memory_bytes, self._directory, there, precision=self._precision(frozen))

    def _device_bytes(self, like: list[Tensor]) -> int:
        """What of the tensors' GPU may be taken for features; 0 on a processor."""
        device = next((leaf.device for leaf in like if leaf.device.type != "cpu"), None)
        if device is None:
            return 0
        if self._device_gb is not None:
            share = int(self._device_gb * 1e9)
        elif device.type == "cuda":
            share = min(_DEVICE_BYTES, int(_DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]))
        else:
            share = _DEVICE_BYTES_ELSEWHERE
        return max(0, share - self._levels.device_bytes)

    def _precision(self, frozen: frozenset[int]) -> Precision:
        return precision_for(frozen, len(self._controller.layers), self._compression)

    def _find_cut(self, batch: int, arguments: Arguments) -> None:
        """Take the cut that skips most among those that change nothing."""
        layouts = [self._call_kind.layout] if self._levels else arguments.layouts(batch)
        self._stale = False
        if not layouts:
            shapes = arguments.shapes
            self._give_up(
                f"the model is called without a tensor of {batch} rows, one for each id, and so there are no rows of "
                "samples to compare" + (f", but shapes {shapes}" if shapes else "")
            )
            return
        found = find_cut(self._model, arguments, batch, layouts, self._needed)
        self.looked += found.samples
        if found.cut is None:
            self._give_up(found.reason)
            return
        if not self._levels:
            self._call_kind.begin(self._model, arguments, found.layout)
        if not self._levels or self._levels[-1].cut.names != found.cut.names:  # else it grew, but the cut stays
            self._levels.add(self._level_at(found, self._controller.frozen))
            found.cut.forget_values()

    def _level_at(self, found: Search, frozen: frozenset[int]) -> Level:
        assert found.cut is not None
        rows = found.rows
        device = next((row.device for row in rows if row.device.type != "cpu"), rows[0].device)
        like = [*rows, torch.empty(len(rows[0]), dtype=torch.int32, device=device)]
        store = self._new_store(like, self._memory_bytes - self.bytes + self._levels.device_bytes, frozen)
        return Level(found.cut, store, rows, frozen, Watch(found.modules), self._give_up)

    def _take_up(self, batch: int, arguments: Arguments) -> None:
        """Make the levels of a loaded state, whose cuts are among the calls of a pass.

        Where the state is of another precision of autocast, features are kept anew.

        Raises UsageError where the pass has no such calls, as that of another model.
        """
        pending, self._pending = self._pending, []
        if not self._call_kind.note_autocast(self._model):
            self.clear()
            return
        for state in pending:
            found = find_again(self._model, arguments, batch, self._call_kind.layout, state["given"], state["skipped"])
            if found.cut is None:
                self._give_up(found.reason)
                return
            level = self._level_at(found, frozenset(state["frozen"]))
            level.load_state_dict(state)
            found.cut.forget_values()
            self._levels.append(level)

    def _switch_off(self, reason: str) -> None:
        """Give up because of what the training does, which its author should know of."""
        self._give_up(reason)
        warnings.warn(f"the feature cache is off: {reason}", stacklevel=2)

    def _fail(self, error: Exception) -> None:
        """Give up because of a fault in here, or since memory is full. The training goes on."""
        self._switch_off(f"it failed with {type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self.clear()
        self._stale = False
        self.reason = reason


def _evaluates(model: nn.Module) -> bool:
    return torch.is_inference_mode_enabled() or not (torch.is_grad_enabled() or model.training)


def _taken(prints: Tensor, indices: list[int]) -> Tensor:
    return prints.index_select(0, index_of(indices, prints.device))


def _called_part(model: nn.Module, part: nn.Module | None) -> nn.Module:
    """What a cache is for: this part of the model, or the model.

    Raises UsageError for a part of something else, and for a model in pieces on several machines: each would have to
    run the prefix as often.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UsageError(
            "a sharded model (FSDP2) is put together by all processes at once, and a cache that knows other samples in "
            "each would leave some of them waiting: use DDP with the cache, or FSDP2 without"
        )
    if part is not None and all(part is not module for module in model.modules()):
        raise UsageError(
            f"model={type(part).__name__}: this is no part of the {type(model).__name__} that the controller freezes: "
            "give the controller's model or a module in it"
        )
    return model if part is None else part

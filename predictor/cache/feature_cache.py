"""The feature cache: the frozen prefix's outputs are kept by sample, so that its forward pass is skipped too."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from predictor.cache.arguments import (
    Arguments,
    Fingerprints,
    Layout,
    check_unchanged,
    check_unique,
    checked_ids,
    same_values,
)
from predictor.cache.compression import CompressedStore, Compression, precision_for
from predictor.cache.cut_points import Cut, uncompiled
from predictor.cache.cut_search import REPEATED, close, find_again, find_cut, gpus_of, prefix_outputs
from predictor.cache.levels import Level, Levels
from predictor.cache.prefetch import ReadAhead, with_next
from predictor.cache.store import FeatureStore, Precision
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent

_Batch = TypeVar("_Batch", bound=Sequence[Any])
_TRIED = 2
"""Samples on which features are checked, when an argument has changed or after a while."""


class FeatureCache:
    """Keeps the frozen prefix's outputs of each sample, and skips the prefix where they are known.

        cache = FeatureCache(controller, memory_gb=4)
        for ids, x, y in loader:                       # each sample has an id
            with cache.batch(ids):                     # a hit skips the frozen prefix; a miss runs and stores it
                loss = loss_fn(model(x), y)

    The model is not changed. Inside `batch`, on a hit, modules before the cut return a stand-in of the right shape, and
    the module at the cut returns what was stored. So do others behind it, where a connection leads around them, as in a
    residual block of which only the first layers are frozen. Where most samples of a batch are known, the prefix is run
    on the others alone.

    Nothing is kept before it is proved on a batch: features have one row a sample, the same in another order and in a
    smaller batch; they are the same after another batch and with other random numbers; and a pass from the cut gives
    the model's outputs. Of the cuts for which that holds, the one that skips most is used. Where there is none the
    cache is off, and `reason` says why. At the first hit, the second, the fourth and so on, the prefix is run on two
    samples to see that their features are still the same. A batch runs as if there was no cache where its arguments
    have other shapes than the first batch's, where an argument that all samples share has another value and features
    depend on it, and where gradients of the model's inputs are wanted.

    A prefix that grows is filled from the features at the old cut, not from the inputs. A prefix that shrinks forgets
    all. To find a cut takes passes forward, so a prefix that grows keeps its cut until another one pays
    (`Levels.worth_a_cut`). When the prefix's weights are written to, as by loading a checkpoint, all is forgotten.

    A sample's inputs must be the same each time it comes. Where they are not, as under random augmentation, UsageError
    is raised, unless `check_inputs=False` says to use the features of the first time for all. An `AugmentedCache`
    keeps several.

    Args:
        controller: freezes the layers.
        model: the part of the controller's model that is called within `batch`; by default the whole.
        memory_gb: the memory for features. Features beyond it go to memory-mapped files.
        directory: the folder of those files; by default the system's temporary one.
        check_inputs: whether to compare each sample's inputs with those of its first time.
        compression: rounds features to fewer bytes; by default they are kept as they are. A prefix that grows is filled
            from rounded features too, but for its first batch, by which its new cut is proved.

    Raises:
        UsageError: `model` is no part of the controller's, the model is sharded (FSDP2), or `memory_gb` is negative.
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
    ) -> None:
        if memory_gb < 0:
            raise UsageError(f"memory_gb={memory_gb}: give the gigabytes of memory to use, from 0")
        self.reason = "nothing is frozen yet"
        """Why nothing is skipped; empty while the cache works."""
        self.hits = 0
        """Batches for which the prefix was skipped, but for a few samples perhaps."""
        self.misses = 0
        """Batches for which it was run."""
        self.looked = 0
        """Samples in the passes forward that were made to find places to cut."""
        self.taken: Counter[frozenset[int] | None] = Counter()
        """Samples of the last batch, by the layers that were frozen when the cut was found from whose features their
        pass began; by None, where it began from the inputs."""
        self._controller = controller
        self._model = _called_part(controller.model, model)
        self._memory_bytes = int(memory_gb * 1e9)
        self._directory = directory
        self._check_inputs = check_inputs
        self._compression = compression
        self._exact = check_inputs and compression is None  # kept features are those that a pass would give again
        self._levels = Levels()
        self._layout: Layout = ()
        self._kind: list[Any] = []  # of the arguments whose features are kept
        self._shared: list[Any] | None = None  # the arguments of the model that all of these samples share
        self._shared_too: list[Any] = []  # the last other values of theirs that give the same features
        self._shared_not: list[Any] = []  # and the last ones that do not
        self._pending: list[dict[str, Any]] = []  # states of levels whose cuts the next pass will show
        self._stale = True
        self._prints = Fingerprints()
        self._ahead = ReadAhead()
        self._following: Tensor | Iterable[int] | None = None
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

        ids: a whole number for each sample of the batch. Raises UsageError for anything else, where the batch has
        another number of samples, and where a sample is not what it was.
        """
        numbers = checked_ids(ids)
        with ExitStack() as stack:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                handle.remove()  # one pass a batch, and none of the passes made here to find a cut
                self.enter(stack, numbers, args, kwargs)

            handle = self._model.register_forward_pre_hook(uncompiled(before), with_kwargs=True)
            stack.callback(handle.remove)
            yield
        following, self._following = self._following, None
        if following is not None:
            self.prefetch(following)

    def enter(self, stack: ExitStack, ids: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arrange for the model's pass that is about to begin on these arguments; it ends with the stack."""
        self.taken = Counter()
        level = self._begin(stack, ids, Arguments(args, kwargs))
        self.hits += level is not None
        self.misses += level is None
        self.taken[None if level is None else level.frozen] += len(ids) - self.taken.total()

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
        level = None if self._wants_a_cut(len(numbers)) else self._known(numbers)
        if level is None:
            return
        fetch, pinned = self._fetching(level, numbers), bool(gpus_of(self._model))

        def read() -> list[Tensor]:
            rows = fetch()
            return [row.pin_memory() for row in rows] if pinned else rows

        self._ahead.start((level, numbers), read)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and all features that are kept: numbers, strings, tensors, lists and dicts of them."""
        levels = self._pending or [level.state_dict() for level in self._levels]
        return {
            "hits": self.hits,
            "misses": self.misses,
            "reason": self.reason,
            "stale": self._stale,
            "kind": self._kind,
            "layout": list(self._layout),
            "shared": self._shared,
            "levels": levels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result; call it after the controller's."""
        self.clear()
        self.hits, self.misses = state["hits"], state["misses"]
        self.reason, self._stale, self._kind = state["reason"], state["stale"], state["kind"]
        self._layout, self._shared = tuple(state.get("layout", ())), state.get("shared")
        self._pending = list(state["levels"])

    def clear(self) -> None:
        """Forget all features."""
        self._ahead.drop()
        self._levels, self._pending = Levels(), []
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

    def _begin(self, stack: ExitStack, ids: list[int], arguments: Arguments) -> Level | None:
        """The level at which the pass begins; None for the inputs."""
        key, rows = self._ahead.take()  # at once: no reading goes on while features are stored
        if 0 not in self._controller.frozen:
            return None
        if any(level.outdated() for level in self._levels):
            self.clear()
        if not (self._levels or self._pending or self._stale):
            return None  # off
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
        self.reason = ""
        prints = self._prints(arguments, self._layout)
        if self._check_inputs:
            check_unique(ids, prints)
        known = self._known(ids)
        if known is not None and self._check_inputs and known.due_for_a_check():
            self._check(known, ids, prints, arguments)
        if self._levels and known is not self._levels[-1]:
            known = self._completed(ids, prints, arguments) or known
        if not self._levels:
            return None
        if known is not None:
            self._replay(stack, known, ids, prints, rows if key == (known, ids) else None)
        if known is self._levels[-1]:
            self._levels.use_newest()
        else:
            stack.enter_context(self._levels[-1].kept(ids, prints))
        return known

    def _unfit(self, batch: int, arguments: Arguments) -> str:
        """Why what is kept is not for a pass on these arguments; empty where it is, or where nothing is kept."""
        if not self._levels and batch < 2:
            return "a batch of one sample cannot show whether features depend on other samples"
        if not self._levels and not self._pending:
            return ""
        if self._pending and not self._layout:  # a state that does not hold it
            self._layout = arguments.layouts(batch)[0]
        if len(arguments.leaves) != len(self._layout):
            return "the model is called with another number of arguments than when features were kept"
        found = arguments.samples(self._layout)
        if len(found) == 1 and found != {batch} and -1 not in found:
            raise UsageError(
                f"the model got no tensor with {batch} rows, one for each id, but {found.pop()} samples: call it "
                "inside `cache.batch(ids)` on the samples that the ids name"
            )
        if found != {batch} or arguments.kind(self._layout) != self._kind:
            return "inputs of another shape than the first batch's, as by padding"
        shared = arguments.shared(self._layout)
        if self._shared is None:
            self._shared = _own(shared)
        if same_values(shared, self._shared) or same_values(shared, self._shared_too):
            return ""
        if not self._levels:
            return "an argument of the model has another value than when features were kept"
        if not same_values(shared, self._shared_not) and self._same_features(batch, arguments):
            self._shared_too = _own(shared)
            return ""
        self._shared_not = _own(shared)
        return "features depend on an argument of the model that has another value than when they were kept"

    def _same_features(self, batch: int, arguments: Arguments) -> bool:
        """Whether some samples' features are the same with the shared arguments of now and those of then."""
        some = list(range(min(_TRIED, batch)))
        inputs = (arguments.rows(self._layout, some, shared) for shared in (None, self._shared))
        try:
            now, then = (prefix_outputs(self._model, self._levels[-1].cut, each) for each in inputs)
        except Exception:
            return False  # a length, say, that goes with the other
        return close(now, then, REPEATED)

    def _check(self, level: Level, ids: list[int], prints: Tensor, arguments: Arguments) -> None:
        """Give up where the prefix no longer gives what the level holds of some of these samples."""
        check_unchanged(ids, prints, level.store.get(ids, prints.device)[-1])
        indices = list(range(min(_TRIED, len(ids))))
        outputs = prefix_outputs(self._model, level.cut, arguments.rows(self._layout, indices))
        if not level.agrees([ids[index] for index in indices], outputs):
            self._give_up(
                "the frozen prefix gives other features for a sample than it gave before, though its weights and "
                "inputs are the same: it depends on a state that changes while the model trains"
            )

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

    def _completed(self, ids: list[int], prints: Tensor, arguments: Arguments) -> Level | None:
        """The furthest level that holds most of these samples, after the prefix has been run on the others."""
        level = self._levels.holding_most(ids) if self._completes and self._usable else None
        indices = [] if level is None else level.store.absent(ids)
        if level is None or not indices:
            return None
        some, prints = [ids[index] for index in indices], prints[indices]
        below = self._levels.holding(some, before=level)
        with ExitStack() as stack:
            if below is not None:
                self._replay(stack, below, some, prints)
            outputs = prefix_outputs(self._model, level.cut, arguments.rows(self._layout, indices))
            level.keep(some, outputs, prints)
        if level not in self._levels or not level.store.holds(ids):
            return None  # they could not be kept
        self.taken[None if below is None else below.frozen] += len(indices)
        return level

    def _replay(
        self, stack: ExitStack, level: Level, ids: list[int], prints: Tensor, rows: list[Tensor] | None = None
    ) -> None:
        """Arrange for the next pass to begin from the level's features of these samples. rows: read ahead."""
        rows = self._fetching(level, ids)() if rows is None else rows
        rows = [row.to(prints.device, non_blocking=row.is_pinned()) for row in rows]
        *rows, prints_then = level.store.unpacked(rows, prints.device)
        if self._check_inputs:
            check_unchanged(ids, prints, prints_then)
        level.replay(stack, self._model, rows, len(ids))

    def _fetching(self, level: Level, ids: list[int]) -> Callable[[], list[Tensor]]:
        """What reads these samples' rows, in any thread; all that is to be chosen is chosen here."""
        return partial(level.store.fetch, ids)

    def _new_store(self, like: list[Tensor], memory_bytes: int, frozen: frozenset[int]) -> FeatureStore:
        if self._compression is None:
            return FeatureStore(like, memory_bytes, self._directory)
        return CompressedStore(like, memory_bytes, self._directory, precision=self._precision(frozen))

    def _precision(self, frozen: frozenset[int]) -> Precision:
        return precision_for(frozen, len(self._controller.layers), self._compression)

    def _find_cut(self, batch: int, arguments: Arguments) -> None:
        """Take the cut that skips most among those that change nothing."""
        layouts = [self._layout] if self._levels else arguments.layouts(batch)
        self._stale = False
        if not layouts:
            self._give_up("the model is called without a tensor, and so there are no rows of samples to compare")
            return
        found = find_cut(self._model, arguments, batch, layouts)
        self.looked += found.samples
        if found.cut is None:
            self._give_up(found.reason)
            return
        if not self._levels:
            self._layout, self._kind = found.layout, arguments.kind(found.layout)
            self._shared, self._shared_too, self._shared_not = _own(arguments.shared(found.layout)), [], []
        if not self._levels or self._levels[-1].cut.names != found.cut.names:  # else it grew, but the cut stays
            self._levels.add(self._level_at(found.cut, found.rows, self._controller.frozen))
            found.cut.forget_values()

    def _level_at(self, cut: Cut, rows: list[Tensor], frozen: frozenset[int]) -> Level:
        like = [*rows, torch.empty(len(rows[0]), dtype=torch.float32)]
        store = self._new_store(like, self._memory_bytes - self.bytes, frozen)
        return Level(cut, store, rows, frozen, self._give_up)

    def _take_up(self, batch: int, arguments: Arguments) -> None:
        """Make the levels of a loaded state, whose cuts are among the calls of a pass.

        Raises UsageError where the pass has no such calls, as that of another model.
        """
        pending, self._pending = self._pending, []
        for state in pending:
            found = find_again(self._model, arguments, batch, self._layout, state["given"], state["skipped"])
            if found.cut is None:
                self._give_up(found.reason)
                return
            level = self._level_at(found.cut, found.rows, frozenset(state["frozen"]))
            level.load_state_dict(state)
            found.cut.forget_values()
            self._levels.append(level)

    def _give_up(self, reason: str) -> None:
        self.clear()
        self._stale = False
        self.reason = reason


def _own(values: list[Any]) -> list[Any]:
    """Copies of arguments, for the caller may write to them."""
    return [each.detach().clone() if isinstance(each, Tensor) else each for each in values]


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

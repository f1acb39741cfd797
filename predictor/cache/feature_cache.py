"""The frozen front's outputs, kept by sample, so that its forward pass is skipped too."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from predictor.cache.compression import CompressedStore, Compression, precision_for
from predictor.cache.cut_points import Cut, uncompiled
from predictor.cache.fingerprints import Fingerprints, check_alike, kind_of
from predictor.cache.level import Level, cut_again
from predictor.cache.levels import Levels
from predictor.cache.prefetch import ReadAhead, with_next
from predictor.cache.store import FeatureStore, Precision, numbers_of
from predictor.cache.verification import called_part, gpus_of, proven_cut, run_front, seen_calls
from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent

_Batch = TypeVar("_Batch", bound=Sequence[Any])


class FeatureCache:
    """Keeps what the frozen front makes of each sample, and skips the front where that is known.

        cache = FeatureCache(controller, memory_gb=4)
        for ids, x, y in loader:                       # each sample has an id
            with cache.batch(ids):                     # a hit skips the frozen front; a miss runs and stores it
                loss = loss_fn(model(x), y)

    The model is left as it is. Inside `batch`, on a hit, modules before the cut return a stand-in of the right shape,
    and the module at the cut what was stored; so do others behind it, where a connection leads around them, as in a
    residual block of which only the first layers are frozen. A cut is taken only after a real forward pass gave
    the same outputs as one with the cut, also with another batch in between; the one that skips most is used, and where
    none is right the cache is off and `reason` says why: slower, never wrong. Where most samples of a batch are known,
    the front is run on the others alone.

    A front that grows is filled from the features at the old cut, not from the inputs; a front that shrinks forgets. To
    find a cut takes passes forward, so a front that grows keeps its cut until another one pays (`Levels.worth_a_cut`).

    A sample's inputs must be the same each time it comes. Where they are not, as under random augmentation, UsageError
    is raised, unless `check_inputs=False` says that the features of the first time shall stand for all; an
    `AugmentedCache` keeps several. Inputs of another shape than the first batch's, as by padding, run as ever. When the
    front's weights are written to, as by loading a checkpoint, all is forgotten.

    model: the part of the controller's model that is called within `batch`, by default the whole; UsageError where it
    is no part. memory_gb: features beyond this go to memory-mapped files. directory: where those are, by default the
    system's temporary folder. compression: rounds features to fewer bytes; by default they are kept as they are. Of
    rounded ones a front that grows is filled too, but for its first batch, by which its new cut is proved.
    """

    _completes = True  # what one sample gives does not depend on the batch that it comes in

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
        """Batches for which the front was skipped, but for a few samples perhaps."""
        self.misses = 0
        """Batches for which it was run."""
        self.looked = 0
        """Samples in the passes forward that were made to find places to cut."""
        self.taken: Counter[frozenset[int] | None] = Counter()
        """Samples of the last batch, by the layers that were frozen when the place was found from whose features their
        pass began; by None, where it began from the inputs."""
        self._controller = controller
        self._model = called_part(controller.model, model)
        self._memory_bytes = int(memory_gb * 1e9)
        self._directory = directory
        self._check_inputs = check_inputs
        self._compression = compression
        self._exact = check_inputs and compression is None  # kept features are those that a pass would give again
        self._levels = Levels()
        self._kind: list[Any] = []  # of the inputs whose features are kept
        self._pending: list[dict[str, Any]] = []  # states of levels whose cuts the next pass will show
        self._stale = True
        self._prints = Fingerprints()
        self._ahead = ReadAhead()
        self._following: Tensor | Iterable[int] | None = None
        controller.on_change(self._front_changed)
        controller.on_moved(self.clear)

    @property
    def cut(self) -> str:
        """The name of the module whose output is kept, the foremost where several are; empty where none is."""
        return self._levels[-1].cut.name if self._levels else ""

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of all modules whose outputs are kept, front to back."""
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
        """Within it, call the model once, on the samples with these ids, in their order."""
        numbers = numbers_of(ids)
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
        level = self._begin(stack, ids, args, kwargs)
        self.hits += level is not None
        self.misses += level is None
        self.taken[None if level is None else level.frozen] += len(ids) - self.taken.total()

    def ahead(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """A loader's batches, of which the first part are the ids: while one is trained on, the next is prefetched."""
        for present, following in with_next(loader):
            self._following = None if following is None else following[0]
            yield present

    def prefetch(self, ids: Tensor | Iterable[int]) -> None:
        """Read what is kept of these samples in the background, for the next `batch`; to be called after the last.

        That takes it where it has the same ids in the same order. Changes no number, and reads nothing where a sample
        is not known. Worth while where features lie in files or go to a GPU. What the reading raises, the next batch
        raises.
        """
        numbers = numbers_of(ids)
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
        counts = {"hits": self.hits, "misses": self.misses}
        return {**counts, "reason": self.reason, "stale": self._stale, "kind": self._kind, "levels": levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result; to be called after the controller's."""
        self.clear()
        self.hits, self.misses = state["hits"], state["misses"]
        self.reason, self._stale, self._kind = state["reason"], state["stale"], state["kind"]
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

    def _front_changed(self, event: FreezeEvent) -> None:
        self._ahead.drop()
        if event.unfroze:
            self.clear()
        self._stale = True

    def _begin(self, stack: ExitStack, ids: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Level | None:
        """The level at which the pass begins; None for the inputs."""
        key, rows = self._ahead.take()  # at once: no reading goes on while features are stored
        if 0 not in self._controller.frozen:
            return None
        if any(level.outdated() for level in self._levels):
            self.clear()
        kind = kind_of(args, kwargs)
        if (self._levels or self._pending) and kind != self._kind:
            return None  # padded to another length, say: what is kept of these samples is not theirs
        self._kind, prints = kind, self._prints(len(ids), args, kwargs)
        if self._pending:
            self._take_up(len(ids), args, kwargs)
        if self._wants_a_cut(len(ids)):
            self._find_cut(len(ids), args, kwargs)
        known = self._known(ids)
        if known is None or known is not self._levels[-1]:
            known = self._completed(ids, prints, args, kwargs) or known
        if not self._levels:
            return None
        if known is not None:
            self._replay(stack, known, ids, prints, rows if key == (known, ids) else None)
        if known is self._levels[-1]:
            self._levels.use_newest()
        else:
            stack.enter_context(self._levels[-1].kept(ids, prints, self._give_up))
        return known

    def _wants_a_cut(self, batch: int) -> bool:
        return self._stale and self._levels.worth_a_cut(self._controller.frozen, batch, self._controller.view)

    def _known(self, ids: list[int]) -> Level | None:
        """The furthest level that holds all of these samples."""
        return self._levels.holding(ids) if self._usable else None

    @property
    def _usable(self) -> bool:
        """Whether a pass may begin from what is kept. What is rounded gives a pass that proves nothing of a new cut."""
        return self._exact or not self._levels or self._levels[-1].proved

    def _completed(self, ids: list[int], prints: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Level | None:
        """The furthest level that holds most of these samples, after the front has been run on the others."""
        level = self._levels.holding_most(ids) if self._completes and self._usable else None
        places = [] if level is None else level.store.absent(ids)
        if level is None or not places:
            return None
        some, prints = [ids[place] for place in places], prints[places]
        below = self._levels.holding(some, before=level)
        with ExitStack() as stack:
            if below is not None:
                self._replay(stack, below, some, prints)
            stack.enter_context(level.kept(some, prints, self._give_up))
            run_front(self._model, level.cut, args, kwargs, len(ids), places)
        if level not in self._levels or not level.store.holds(ids):
            return None  # they could not be kept
        self.taken[None if below is None else below.frozen] += len(places)
        return level

    def _replay(
        self, stack: ExitStack, level: Level, ids: list[int], prints: Tensor, rows: list[Tensor] | None = None
    ) -> None:
        """Arrange for the next pass to begin from what the level holds of these samples. rows: read ahead."""
        rows = self._fetching(level, ids)() if rows is None else rows
        rows = [row.to(prints.device, non_blocking=row.is_pinned()) for row in rows]
        *leaves, prints_then = self._unpacked(level, rows, prints.device)
        if self._check_inputs:
            check_alike(ids, prints, prints_then)
        level.replay(stack, self._model, leaves, len(ids), self._give_up)

    def _fetching(self, level: Level, ids: list[int]) -> Callable[[], list[Tensor]]:
        """What reads these samples' rows, in any thread; all that is to be chosen is chosen here."""
        return partial(level.store.fetch, ids)

    def _unpacked(self, level: Level, rows: list[Tensor], device: torch.device) -> list[Tensor]:
        """What goes into the model, and the fingerprints."""
        return level.store.unpacked(rows, device)

    def _new_store(self, like: list[Tensor], memory_bytes: int, frozen: frozenset[int]) -> FeatureStore:
        if self._compression is None:
            return FeatureStore(like, memory_bytes, self._directory)
        return CompressedStore(like, memory_bytes, self._directory, precision=self._precision(frozen))

    def _precision(self, frozen: frozenset[int]) -> Precision:
        return precision_for(frozen, len(self._controller.layers), self._compression)

    def _find_cut(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the cut that skips most among those that change nothing."""
        self._stale = False
        cut, reason, looked = proven_cut(self._model, args, kwargs, batch)
        self.looked += looked
        if cut is None:
            self._give_up(reason)
        elif not self._levels or self._levels[-1].cut.names != cut.names:  # else it grew, but not to another place
            self._levels.add(self._level_at(cut, self._controller.frozen))
            cut.forget_values()  # they have served to find the cut; the shapes are needed from here on
            self.reason = ""

    def _level_at(self, cut: Cut, frozen: frozenset[int]) -> Level:
        leaves = cut.leaves()
        like = [*leaves, torch.empty(len(leaves[0]))]
        return Level(cut, self._new_store(like, self._memory_bytes - self.bytes, frozen), leaves, frozen)

    def _take_up(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the levels of a loaded state, whose cuts are among the calls of a pass."""
        calls = seen_calls(self._model, args, kwargs)
        pending, self._pending = self._pending, []
        for state in pending:
            level = self._level_at(cut_again(calls, state, batch), frozenset(state["frozen"]))
            level.load_state_dict(state)
            self._levels.append(level)
        for level in self._levels:
            level.cut.forget_values()

    def _give_up(self, reason: str) -> None:
        self.clear()
        self._stale = False
        self.reason = reason

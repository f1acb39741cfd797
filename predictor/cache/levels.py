"""The places at which a front is cut now: the newest, and the one that it is filled from."""

from collections.abc import Sequence

from predictor.cache.level import Level
from predictor.cache.verification import look_passes
from predictor.policies.base import View

_MUCH_LARGER = 1.5


class Levels(list[Level]):
    """None, one, or two of them, the newest last."""

    @property
    def bytes(self) -> int:
        """Bytes of features kept, in memory and on the disk."""
        return sum(level.store.bytes for level in self)

    @property
    def exact_bytes(self) -> int:
        """Bytes that features of the same samples would take as they were computed, each kept once."""
        return sum(level.store.exact_bytes for level in self)

    def add(self, level: Level) -> None:
        """Take a new level, to be filled from that at which most is known: a front may grow before one is complete."""
        fullest = max(reversed(self), key=lambda old: len(old.store), default=None)
        self[:] = [level] if fullest is None else [fullest, level]

    def use_newest(self) -> None:
        """A pass begins at the newest level: the other one may have served."""
        self[-1].used = True
        if len(self) == 2 and len(self[-1].store) >= len(self[0].store):
            del self[0]

    def worth_a_cut(self, frozen: frozenset[int], batch: int, view: View) -> bool:
        """Whether a front that has grown to these layers should be cut anew, which takes some passes forward.

        The features at the newest cut must have been of use, or the front be half as large again; and what the passes
        that are left in the training would be spared must be more than what it takes to look. A pass is taken to be
        spared its share of the layers, from when each sample has come once more.
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

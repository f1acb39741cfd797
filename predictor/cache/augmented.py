"""The feature cache for samples that are augmented at random: several views of each are kept and combined."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from predictor.cache.compression import CompressedStore, channel_dimension, has_channels
from predictor.cache.feature_cache import FeatureCache
from predictor.cache.levels import Level
from predictor.cache.store import FeatureStore, Precision, moved
from predictor.controller import FreezeController
from predictor.errors import UsageError


class AugmentedCache(FeatureCache):
    """A FeatureCache that keeps several views of each sample, for random augmentation. An approximation.

    Paper: similarity-aware channel augmentation of "Rethinking the Potential of Layer Freezing" (Yang et al., 2025,
    arXiv 2508.15033). Of the frozen prefix's features, the few channels that are most sensitive to augmentation are
    kept in augmented form. The paper's progressive compression is the option `compression`.

    Rule: a sample's first `views` passes run the prefix, and its features are kept: whole the first time, then in the
    sensitive channels alone. Later passes skip the prefix. They begin from the sensitive channels of one of the
    sample's views, drawn at random, and the other channels of its first view.

    Differs: the paper gives the principle, and the rest is ours. A training shows no sample without augmentation, so
    the channels that the views share are those of an augmented one. Sensitive channels are those in which two views of
    the same samples are least alike (`channel_similarity`). They are measured once for each cut, on the first samples
    that come a second time. A prefix that grows is filled from the views at the old cut, the first from the first and
    so on.

    Cost: `views` passes of the prefix for each sample, after each growth too where the old views were not complete.
    Memory for 1 + (views - 1) * channels times what an exact cache keeps, before compression. Variety, since a sample
    is seen in at most `views` ways. A `state_dict` holds all features.

    Args:
        controller: freezes the layers.
        views: how many views of a sample are kept.
        channels: the share of channels that count as sensitive.
        seed: of the views that are drawn, which depend on it and on the number of the batch alone.
        options: `model`, `memory_gb`, `device_gb`, `directory` and `compression` of a FeatureCache.

    Raises:
        UsageError: `views` is below 1, or `channels` is not in (0, 1].
    """

    _completes = False  # a sample has several passes of its own to run before it is known

    def __init__(
        self, controller: FreezeController, *, views: int = 3, channels: float = 0.25, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(controller, check_inputs=False, **options)
        if views < 1:
            raise UsageError(f"views={views}: give the views of a sample to keep, from 1")
        if not 0 < channels <= 1:
            raise UsageError(f"channels={channels}: give the share of channels that count as sensitive, up to 1")
        self._views, self._channels = views, channels
        self._seed = seed

    def _fetching(self, level: Level, ids: list[int]) -> Callable[[], list[Tensor]]:
        newest = self._levels[-1]
        if level is newest:
            views = torch.randint(self._views, (len(ids),), generator=self._generator(), device="cpu").tolist()
        else:
            views = _view_store(newest).missing(ids)  # its first view is made of the old first one, and so on
        return partial(_view_store(level).fetch, ids, views)

    def _new_store(self, like: list[Tensor], memory_bytes: int, frozen: frozenset[int]) -> FeatureStore:
        return ViewStore(
            like,
            memory_bytes,
            self._directory,
            self._device_bytes(like),
            precision=self._precision(frozen),
            views=self._views,
            channels=self._channels,
        )

    def _generator(self) -> torch.Generator:
        """Of the batch that comes next."""
        return torch.Generator().manual_seed(self._seed * 1_000_003 + self.hits + self.misses)


class ViewStore(CompressedStore):
    """A CompressedStore whose `put` adds a view of a sample, until it has `views` of them.

    The first view is kept whole. Which channels of the others are kept is measured once, on the first samples that come
    a second time: in each output the share `channels` of its channels, at least one, in which their two views are
    least alike. A sample is held when all of its views are.

    Args:
        like, memory_bytes, directory, device_bytes, precision: as for a CompressedStore; the views share the bytes.
        views: how many views of a sample are kept.
        channels: the share of channels that is kept of each view but the first.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        memory_bytes: int,
        directory: Path | str | None = None,
        device_bytes: int = 0,
        *,
        precision: Precision,
        views: int,
        channels: float,
    ) -> None:
        share = 1 / (1 + (views - 1) * channels)
        first_bytes, first_there = int(memory_bytes * share), int(device_bytes * share)
        super().__init__(like, first_bytes, directory, first_there, precision=precision)
        self._views = views
        self._share = channels
        self._later_bytes, self._later_there = memory_bytes - first_bytes, device_bytes - first_there
        self._files = directory
        self._later: CompressedStore | None = None  # a row for each view but the first, found by `_key`
        self._sensitive: list[Tensor | None] = []  # of each output the channels, once they were measured
        self._seen: dict[int, int] = {}
        self._complete = 0

    def __len__(self) -> int:
        return self._complete

    @property
    def bytes(self) -> int:
        """Bytes of all views held."""
        return super().bytes + (0 if self._later is None else self._later.bytes)

    @property
    def device_bytes(self) -> int:
        """Bytes reserved where the tensors lie, such as on a GPU."""
        return super().device_bytes + (0 if self._later is None else self._later.device_bytes)

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether every view of every one of these samples is here."""
        return all(self._seen.get(i) == self._views for i in ids)

    def missing(self, ids: Sequence[int]) -> list[int]:
        """The number of the view that each sample gets next, from 0; the last one where it has all."""
        return [min(self._seen.get(i, 0), self._views - 1) for i in ids]

    def put(self, ids: Sequence[int], leaves: Sequence[Tensor]) -> None:
        """Keep the next view of each of these samples that has not got all."""
        seen_B = [self._seen.get(i, 0) for i in ids]
        for view in sorted(set(seen_B) - {self._views}):
            at = [index for index, seen in enumerate(seen_B) if seen == view]
            some = [ids[index] for index in at]
            index_B = torch.tensor(at, dtype=torch.int64, device="cpu")
            rows = [leaf.detach().index_select(0, moved(index_B, leaf.device)) for leaf in leaves]
            if view == 0:
                super().put(some, rows)
            else:
                self._put_later(view, some, rows)
            self._seen.update(dict.fromkeys(some, view + 1))
            self._complete += len(set(some)) if view + 1 == self._views else 0

    def fetch(self, ids: Sequence[int], views: Sequence[int] | None = None) -> list[Tensor]:
        """The rows of these samples as they lie here, for `unpacked`: of these views, by default the first of each."""
        at = [index for index, view in enumerate(views or ()) if view > 0]
        later: list[Tensor] = []
        if at and self._later is not None:
            later = self._later.fetch([self._key(ids[index], (views or ())[index]) for index in at])
        return [*super().fetch(ids), torch.tensor(at, dtype=torch.int64, device="cpu"), *later]

    def moved(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """What `fetch` gave, where the first views were computed."""
        count = sum(self._parts)
        return [*super().moved(rows[:count]), *rows[count:]]

    def unpacked(self, rows: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
        """What `fetch` gave, as it goes into the model: where it was computed, or on `device`."""
        count = sum(self._parts)
        first, at, later = rows[:count], rows[count], rows[count + 1 :]
        leaves = super().unpacked(first, device)
        if self._later is not None and len(at):
            shown = iter(self._later.unpacked(later, device))
            for leaf, channels_C in zip(leaves, self._sensitive, strict=True):
                if channels_C is not None:
                    dim = channel_dimension(leaf)
                    view = next(shown).movedim(dim, 1)
                    place = moved(at, leaf.device)[:, None], moved(channels_C, leaf.device)
                    leaf.movedim(dim, 1)[place] = view
        return leaves

    def state_dict(self) -> dict[str, Any]:
        """All views held, with the samples' ids, and the sensitive channels."""
        return {
            "first": super().state_dict(),
            "later": None if self._later is None else self._later.state_dict(),
            "sensitive": self._sensitive,
            "seen": torch.tensor(list(self._seen.items()), dtype=torch.int64, device="cpu").view(-1, 2),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the views of a store of the same kind. Raises OSError when the disk is full."""
        super().load_state_dict(state["first"])
        self._seen = dict(state["seen"].tolist())
        self._complete = sum(seen == self._views for seen in self._seen.values())
        self._sensitive = list(state["sensitive"])
        if state["later"] is not None:
            one = self.get(state["first"]["ids"][:1].tolist())
            self._later = self._later_like(self._chosen(one))
            self._later.load_state_dict(state["later"])

    def _put_later(self, view: int, ids: list[int], rows: list[Tensor]) -> None:
        if not self._sensitive:
            before = self.get(ids)
            self._sensitive = [self._measured(a, b) for a, b in zip(before, rows, strict=True)]
        chosen = self._chosen(rows)
        if self._later is None:
            self._later = self._later_like(chosen)
        self._later.put([self._key(i, view) for i in ids], chosen)

    def _later_like(self, chosen: list[Tensor]) -> CompressedStore:
        return CompressedStore(chosen, self._later_bytes, self._files, self._later_there, precision=self.precision)

    def _key(self, sample: int, view: int) -> int:
        return sample * self._views + view

    def _measured(self, first: Tensor, second: Tensor) -> Tensor | None:
        return sensitive_channels(channel_similarity(first, second), self._share).cpu() if has_channels(first) else None

    def _chosen(self, rows: list[Tensor]) -> list[Tensor]:
        """What of a view is kept."""
        return [
            leaf.index_select(channel_dimension(leaf), moved(channels_C, leaf.device))
            for leaf, channels_C in zip(rows, self._sensitive, strict=True)
            if channels_C is not None
        ]


def channel_similarity(first: Tensor, second: Tensor) -> Tensor:
    """How alike two outputs are in each channel, similarity_C: 1 where they are equal, less the more they differ.

    2 <a, b> / (|a|^2 + |b|^2) over all samples and positions of the channel, which is the cosine between a and b where
    both are of one length. A channel that is 0 in both is alike.
    """
    others = [dim for dim in range(first.dim()) if dim != channel_dimension(first)]
    a, b = first.float(), second.float()
    size_C = (a * a + b * b).sum(others)
    return torch.where(size_C > 0, 2 * (a * b).sum(others) / size_C, torch.ones_like(size_C))


def sensitive_channels(similarity_C: Tensor, share: float) -> Tensor:
    """The indices of the share of channels, at least one, that are least alike, ascending."""
    count = max(1, round(share * len(similarity_C)))
    return torch.argsort(similarity_C, stable=True)[:count].sort().values


def _view_store(level: Level) -> ViewStore:
    assert isinstance(level.store, ViewStore)
    return level.store

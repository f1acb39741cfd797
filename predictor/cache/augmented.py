"""Feature caches for samples that are augmented at random: kept views put together, or kept maps moved."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from predictor.cache.feature_cache import FeatureCache
from predictor.cache.level import Level
from predictor.cache.store import FeatureStore
from predictor.cache.views import ViewStore
from predictor.controller import FreezeController
from predictor.errors import UsageError


class AugmentedCache(FeatureCache):
    """A FeatureCache for samples that are augmented at random, which keeps several views of each. Near, never exact.

    Paper: similarity-aware channel augmentation of "Rethinking the Potential of Layer Freezing" (Yang et al., 2025,
    arXiv 2508.15033): of what the frozen front gives, the few channels that are most sensitive to augmentation are kept
    in augmented form. Its progressive compression is the option `compression`. Rule: a sample's first `views` passes
    run the front, and what it gives is kept, whole the first time and then in the sensitive channels alone. Later
    passes skip the front: they begin from the sensitive channels of one of the sample's views, drawn at random, and the
    other channels of its first. Our reading: all of that but the principle. A training shows no sample as it is without
    augmentation, so the channels that the views share are those of an augmented one, and sensitive are those in which
    two views of the same samples are least alike (`predictor.cache.views.channel_similarity`), measured once for
    each place of the cut, on the first samples that come a second time. A front that grows is filled from the views at
    the old cut, the first from the first and so on. Cost: `views` passes of the front for each sample, after each
    growth too where the old views were not complete; memory for 1 + (views - 1) * channels times what an exact cache
    keeps, before compression; variety, since a sample is seen in no more than `views` ways. A `state_dict` holds all
    features.

    views: kept of each sample. channels: the share of channels that count as sensitive. seed: of what is drawn, which
    depends on it and on the number of the batch alone. options: memory_gb, directory and compression of a FeatureCache.
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
            views = torch.randint(self._views, (len(ids),), generator=_generator(self, self._seed)).tolist()
        else:
            views = _view_store(newest).missing(ids)  # its first view is made of the old first one, and so on
        return partial(_view_store(level).fetch, ids, views)

    def _new_store(self, like: list[Tensor], memory_bytes: int, frozen: frozenset[int]) -> FeatureStore:
        return ViewStore(
            like,
            memory_bytes,
            self._directory,
            precision=self._precision(frozen),
            views=self._views,
            channels=self._channels,
        )


class DirectCache(FeatureCache):
    """A FeatureCache that augments the kept maps themselves, as if they were images. To compare with.

    Paper: "Rethinking the Potential of Layer Freezing" (arXiv 2508.15033) is told to have found that this loses much
    accuracy. Rule: what a sample's last pass through the front gave is kept, and at each hit its maps are mirrored left
    to right, one time in two, and moved. Our reading: how they are moved. All maps of a sample are moved alike, as its
    image would be; outputs that are no maps (B, C, H, W) are given as they were kept. Cost: no more memory than an
    exact cache; each hit gathers the maps anew. A `state_dict` holds all features.

    flip: whether maps are mirrored. shift: by what share of their height and width they move at most, each way, rounded
    to whole places; zeros come in at the border. seed: of what is drawn, which depends on it and on the number of the
    batch alone. options: memory_gb, directory and compression of a FeatureCache.
    """

    def __init__(
        self, controller: FreezeController, *, flip: bool = True, shift: float = 0.125, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(controller, check_inputs=False, **options)
        if not 0 <= shift < 1:
            raise UsageError(f"shift={shift}: give the share of a map's width by which it moves at most, below 1")
        self._flip, self._shift = flip, shift
        self._seed = seed

    def _unpacked(self, level: Level, rows: list[Tensor], device: torch.device) -> list[Tensor]:
        leaves = super()._unpacked(level, rows, device)
        if level is not self._levels[-1]:
            return leaves  # to fill the new level from, which moves its own
        batch, generator = len(leaves[0]), _generator(self, self._seed)
        mirror_B = torch.rand(batch, generator=generator) < (0.5 if self._flip else 0.0)
        down_B, right_B = (2 * torch.rand(2, batch, generator=generator) - 1) * self._shift
        return [moved(leaf, mirror_B, down_B, right_B) if leaf.dim() == 4 else leaf for leaf in leaves]


def moved(map_BCHW: Tensor, mirror_B: Tensor, down_B: Tensor, right_B: Tensor) -> Tensor:
    """Each sample's map mirrored left to right where `mirror_B` says so, and then moved, in its memory format.

    down_B, right_B: by these shares of the height and the width, rounded to whole places. Zeros come in at the border.
    """
    batch, _, height, width = map_BCHW.shape
    rows_BH = torch.arange(height) - (down_B * height).round().long()[:, None]
    columns_BW = torch.arange(width) - (right_B * width).round().long()[:, None]
    inside_BH, inside_BW = (rows_BH >= 0) & (rows_BH < height), (columns_BW >= 0) & (columns_BW < width)
    inside_BHW = (inside_BH[:, :, None] & inside_BW[:, None, :]).to(map_BCHW.device)
    columns_BW = torch.where(mirror_B[:, None], width - 1 - columns_BW, columns_BW)
    place_BHW = rows_BH.clamp(0, height - 1)[:, :, None] * width + columns_BW.clamp(0, width - 1)[:, None, :]
    place_BCP = place_BHW.to(map_BCHW.device).view(batch, 1, -1).expand(-1, map_BCHW.shape[1], -1)
    found_BCHW = map_BCHW.flatten(2).gather(2, place_BCP).view(map_BCHW.shape)
    return torch.empty_like(map_BCHW).copy_(found_BCHW.where(inside_BHW[:, None], 0.0))


def _generator(cache: FeatureCache, seed: int) -> torch.Generator:
    """Of the batch that comes next."""
    return torch.Generator().manual_seed(seed * 1_000_003 + cache.hits + cache.misses)


def _view_store(level: Level) -> ViewStore:
    assert isinstance(level.store, ViewStore)
    return level.store

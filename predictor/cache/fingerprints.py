"""Telling whether a sample's inputs are what they were before: by their shape, and by one number for each."""

from typing import Any

import torch
from torch import Tensor

from predictor.errors import UsageError
from predictor.layers.tensors import tensors_in


class Fingerprints:
    """Random projections of a model's inputs, the same ones each time."""

    def __init__(self) -> None:
        self._projections: dict[torch.Size, Tensor] = {}

    def __call__(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One number a sample that changes when its inputs do: prints_B, float32.

        batch: samples in the arguments of the model's call. Raises UsageError where none of them has as many rows.
        """
        prints = None
        for leaf in tensors_in((args, kwargs)):
            if leaf.dim() and leaf.shape[0] == batch:
                flat = leaf.detach().reshape(batch, -1).float()
                part = self._projected(flat)
                prints = part if prints is None else prints + part
        if prints is None:
            raise UsageError(
                f"the model got no tensor with {batch} rows, one for each id: call it inside `cache.batch(ids)` on the "
                "samples that the ids name"
            )
        return prints

    def _projected(self, flat_BK: Tensor) -> Tensor:
        projection_K = self._projection(flat_BK.shape[1:], flat_BK.device)
        if not torch.is_autocast_enabled(flat_BK.device.type):
            return flat_BK @ projection_K
        with torch.autocast(flat_BK.device.type, enabled=False):
            return flat_BK @ projection_K

    def _projection(self, shape: torch.Size, device: torch.device) -> Tensor:
        if shape not in self._projections:
            generator = torch.Generator().manual_seed(0)
            self._projections[shape] = torch.randn(shape, generator=generator).to(device)
        return self._projections[shape].to(device)


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Shape but for the batch, and type, of each tensor that a model is called with: lists and strings of them."""
    return [[list(leaf.shape[1:]), str(leaf.dtype)] for leaf in tensors_in((args, kwargs))]


def check_alike(ids: list[int], prints_B: Tensor, then_B: Tensor) -> None:
    """Raise UsageError where one of these samples has other inputs than when its features were kept."""
    if torch.equal(prints_B, then_B):
        return
    apart_B = (prints_B - then_B).abs() > 1e-3 * (1 + prints_B.abs())
    if bool(apart_B.any()):
        raise UsageError(
            f"sample {ids[int(apart_B.nonzero()[0])]} is not what it was when its features were kept, as under "
            "random augmentation: train without the cache, switch the augmentation off, take an AugmentedCache, or "
            "say FeatureCache(..., check_inputs=False) to keep the features of the first time"
        )

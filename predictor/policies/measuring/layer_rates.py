"""Layers that follow learning rates of their own: where they start, and how they relate to the training's schedule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from predictor.layers.layer import Layer


class OwnRates:
    """Turns rates of layers into what `FreezePolicy.rates` returns: multiples of the scheduled rate.

    optimizer: whose parameter groups hold the layers; a layer goes by the group that holds most of it, by the first
    where none does. lr: the rate from which every layer starts; by default the highest of a schedule that names it
    (`OneCycleLR`), else that from which the optimizer started, by parameter group.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer], lr: float | None = None) -> None:
        self._optimizer = optimizer
        self._groups = [_group_of(layer, optimizer) for layer in layers]
        self.start_L = [_start_of(optimizer.param_groups[group]) if lr is None else lr for group in self._groups]
        """The rate at which each layer starts."""

    def factors(self, places: Iterable[int], rate: Callable[[int], float]) -> Mapping[int, float]:
        """By place, the layer's `rate(place)` as a multiple of the scheduled one; nothing where that is zero."""
        scheduled = [float(self._optimizer.param_groups[group]["lr"]) for group in self._groups]
        return {place: rate(place) / scheduled[place] for place in places if scheduled[place] > 0}


def _start_of(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _group_of(layer: Layer, optimizer: Optimizer) -> int:
    """The number of the parameter group that holds most of a layer; of the first where none does."""
    sizes = [0] * len(optimizer.param_groups)
    own = {id(parameter) for parameter in layer.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        sizes[number] = sum(parameter.numel() for parameter in group["params"] if id(parameter) in own)
    return sizes.index(max(sizes))

"""Learning rates of single layers, as multiples of the training's schedule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from predictor.layers.layer import Layer


class OwnRates:
    """Converts learning rates of layers into what `FreezePolicy.rates` returns: multiples of the scheduled rate.

    Args:
        optimizer: the optimizer that holds the layers. A layer's scheduled rate is that of the parameter group that
            holds most of it, of the first group where none does.
        layers: front to back.
        lr: the rate at which every layer starts. By default the highest of a schedule that names it (`OneCycleLR`),
            else the rate from which the optimizer started, by parameter group.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[Layer], lr: float | None = None) -> None:
        self._optimizer, self._layers, self._lr = optimizer, layers, lr
        self._count = len(optimizer.param_groups)
        self._groups = [_group_of(layer, optimizer) for layer in layers]
        self.start_L = [_start_of(optimizer.param_groups[group]) if lr is None else lr for group in self._groups]
        """The rate at which each layer starts."""

    def factors(self, indices: Iterable[int], rate: Callable[[int], float]) -> Mapping[int, float]:
        """Each layer's `rate(index)` as a multiple of the scheduled rate, by index. Left out where that is zero."""
        if len(self._optimizer.param_groups) != self._count:
            self._regroup()
        scheduled = [float(self._optimizer.param_groups[group]["lr"]) for group in self._groups]
        return {index: rate(index) / scheduled[index] for index in indices if scheduled[index] > 0}

    def _regroup(self) -> None:
        """Find the layers whose parameters the optimizer got in a group that was added later."""
        known, self._count = self._count, len(self._optimizer.param_groups)
        for index, layer in enumerate(self._layers):
            group = _group_of(layer, self._optimizer)
            if group >= known:
                self._groups[index] = group
                self.start_L[index] = _start_of(self._optimizer.param_groups[group]) if self._lr is None else self._lr


def _start_of(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _group_of(layer: Layer, optimizer: Optimizer) -> int:
    """The number of the parameter group that holds most of a layer; of the first where none does."""
    sizes = [0] * len(optimizer.param_groups)
    own = {id(parameter) for parameter in layer.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        sizes[number] = sum(parameter.numel() for parameter in group["params"] if id(parameter) in own)
    return sizes.index(max(sizes))

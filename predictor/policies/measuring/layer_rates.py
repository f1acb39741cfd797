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
        self._optimizer = optimizer
        self._groups = [group or 0 for group in group_of_layers(layers, optimizer.param_groups)]
        self.start_L = [_start_of(optimizer.param_groups[group]) if lr is None else lr for group in self._groups]
        """The rate at which each layer starts."""

    def factors(self, indices: Iterable[int], rate: Callable[[int], float]) -> Mapping[int, float]:
        """Each layer's `rate(index)` as a multiple of the scheduled rate, by index. Left out where that is zero."""
        scheduled = [float(self._optimizer.param_groups[group]["lr"]) for group in self._groups]
        return {index: rate(index) / scheduled[index] for index in indices if scheduled[index] > 0}


def _start_of(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def group_of_layers(layers: Sequence[Layer], groups: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Of each layer, the number of the parameter group that holds most of it; None where none does."""
    number_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
    found: list[int | None] = []
    for layer in layers:
        sizes: dict[int, int] = {}
        for parameter in layer.parameters():
            if id(parameter) in number_of:
                number = number_of[id(parameter)]
                sizes[number] = sizes.get(number, 0) + parameter.numel()
        found.append(min(sizes, key=lambda number: (-sizes[number], number), default=None))
    return found

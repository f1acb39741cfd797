"""Learning rates of single layers, as multiples of the training's schedule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from predictor.freezing.optimizers import optimizers_of
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
        self._known: list[int] = []  # parameter groups that were seen, of each optimizer
        self._groups = [0] * len(layers)
        self.start_L = [0.0] * len(layers)
        """The rate at which each layer starts."""
        self._take_groups()

    def factors(self, indices: Iterable[int], rate: Callable[[int], float]) -> Mapping[int, float]:
        """Each layer's `rate(index)` as a multiple of the scheduled rate, by index. Left out where that is zero."""
        if self._counts() != self._known:
            self._take_groups()
        scheduled = [float(self._optimizer.param_groups[group]["lr"]) for group in self._groups]
        return {index: rate(index) / scheduled[index] for index in indices if scheduled[index] > 0}

    def _take_groups(self) -> None:
        """Find the layers' groups: at the start all, later those whose group was added since."""
        groups, counts = self._optimizer.param_groups, self._counts()
        known, self._known = self._known or [0] * len(counts), counts
        is_new = [number >= seen for count, seen in zip(counts, known, strict=True) for number in range(count)]
        for index, group in enumerate(group_of_layers(self._layers, groups)):
            number = self._groups[index] = group or 0
            if is_new[number]:
                self.start_L[index] = _start_of(groups[number]) if self._lr is None else self._lr

    def _counts(self) -> list[int]:
        return [len(each.param_groups) for each in optimizers_of(self._optimizer)]


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

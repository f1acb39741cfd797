"""What several policies measure: a layer's gradients, how far the last step moved it, and when an interval ends."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from predictor.layers.layer import Layer


def gradients(layer: Layer) -> list[Tensor]:
    """The gradients that a layer's parameters have now."""
    return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]


@torch.no_grad()
def gradient_norms(layers: Sequence[Layer]) -> Tensor:
    """norm_L: the Euclidean norm of each layer's gradient, over all its parameters; NaN where there is none."""
    norms = [_gradient_norm(layer) for layer in layers]
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def whole(value: Tensor) -> Tensor:
    """A number as all processes see it, where FSDP2 has the weights in pieces on several machines."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def read(values: Sequence[Tensor]) -> list[float]:
    """Numbers that may be on several devices: waits for them once."""
    first, *_ = values = [whole(value) for value in values]
    return [float(number) for number in torch.stack([value.to(first.device) for value in values]).tolist()]


def steps_into_interval(step: int, total_steps: int, intervals: int) -> int:
    """Steps since one of so many equal intervals of a training began; 0 at its border."""
    border = -(-(step * intervals // total_steps) * total_steps // intervals)
    return step - border


def interval_ends(step: int, total_steps: int, intervals: int) -> bool:
    """Whether one of so many equal intervals of a training ends with this step. Never at step 0."""
    return step > 0 and steps_into_interval(step, total_steps, intervals) == 0


def _gradient_norm(layer: Layer) -> Tensor:
    found = gradients(layer)
    if not found:
        return torch.full((), math.nan, device=layer.own[0].device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([whole(norm) for norm in torch._foreach_norm(found)]).float())
    return norm


class LastStep:
    """How far one optimizer step moves each layer: the weights are kept before it, and compared after it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._before: list[list[Tensor]] = []

    @property
    def kept(self) -> bool:
        """Whether the weights from before a step are here."""
        return bool(self._before)

    def keep(self) -> None:
        """Keep all layers' weights as they are now: as much memory as they take."""
        self._before = [[p.detach().clone() for p in layer.parameters()] for layer in self._layers]

    def before(self, place: int) -> list[Tensor]:
        """The kept weights of a layer, in the order of its parameters."""
        return self._before[place]

    @torch.no_grad()
    def moved(self, place: int) -> list[Tensor]:
        """What has been added to each of a layer's parameters since `keep`."""
        return list(torch._foreach_sub(list(self._layers[place].parameters()), self._before[place]))

    def drop(self) -> None:
        """Forget the kept weights."""
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """The kept weights, if a step is being waited for."""
        return {"before": [[weight.cpu() for weight in weights] for weights in self._before]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again, each where its parameter is."""
        self._before = [
            [
                weight.to(parameter.device, copy=True)
                for weight, parameter in zip(weights, layer.parameters(), strict=True)
            ]
            for weights, layer in zip(state["before"], self._layers, strict=False)
        ]

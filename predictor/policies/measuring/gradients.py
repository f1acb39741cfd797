"""What several policies measure: a layer's gradients, its last step, and where an interval of the training ends."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from predictor.layers.layer import Layer


def gradients(layer: Layer) -> list[Tensor]:
    """The gradients of a layer's parameters, where they have any."""
    return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]


def matrices(layer: Layer) -> list[Tensor]:
    """A layer's parameters of two or more dimensions, such as weights without biases and norms; all if it has none."""
    own: list[Tensor] = list(layer.parameters())
    return [parameter for parameter in own if parameter.dim() >= 2] or own


@torch.no_grad()
def gradient_norms(layers: Sequence[Layer]) -> Tensor:
    """norm_L: the Euclidean norm of each layer's gradient, over all its parameters; NaN where there is none.

    Float32, on the first layer's device.
    """
    norms = gradient_norms_of(layers)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


@torch.no_grad()
def gradient_norms_of(layers: Sequence[Layer]) -> list[Tensor]:
    """The same numbers, each on its layer's device."""
    return [_gradient_norm(layer) for layer in layers]


def whole(value: Tensor) -> Tensor:
    """A number over all processes, where FSDP2 has sharded the weights."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def real_of(values: Tensor) -> Tensor:
    """The numbers in float32, of complex ones both parts."""
    return (torch.view_as_real(values) if values.is_complex() else values).float()


def read(values: Sequence[Tensor]) -> list[float]:
    """Read numbers that may be on several devices, with one synchronization."""
    first, *_ = values = [whole(value) for value in values]
    return [float(number) for number in torch.stack([value.to(first.device) for value in values]).tolist()]


def to_host(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape and dtype on the CPU, with one synchronization for each device that they are on."""
    by_device: dict[torch.device, list[int]] = {}
    for number, row in enumerate(rows):
        by_device.setdefault(row.device, []).append(number)
    order = [number for numbers in by_device.values() for number in numbers]
    parts = [torch.stack([rows[number] for number in numbers]).cpu() for numbers in by_device.values()]
    stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
    return stacked if len(parts) == 1 else stacked[torch.tensor(order, device="cpu").argsort()]


def steps_into_interval(step: int, total_steps: int, intervals: int) -> int:
    """Steps since the current one of so many equal intervals of a training began; 0 at its border."""
    border = -(-(step * intervals // total_steps) * total_steps // intervals)
    return step - border


def interval_ends(step: int, total_steps: int, intervals: int) -> bool:
    """Whether one of so many equal intervals of a training ends with this step. Never at step 0."""
    return step > 0 and steps_into_interval(step, total_steps, intervals) == 0


def _gradient_norm(layer: Layer) -> Tensor:
    found = [_values(gradient) for gradient in gradients(layer) if gradient.numel()]
    if not found:
        return torch.full((), math.nan, dtype=torch.float32, device=layer.own[0].device)
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([whole(torch.linalg.vector_norm(gradient)) for gradient in found]).float()
    )
    return norm


def _values(gradient: Tensor) -> Tensor:
    """The gradient, or what is not zero in it, as that of an embedding with `sparse=True`."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class LastStep:
    """How far one optimizer step moves each layer: weights are copied before it and compared after it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._before: list[list[Tensor]] = []

    @property
    def kept(self) -> bool:
        """Whether there are copies from before a step."""
        return bool(self._before)

    def keep(self) -> None:
        """Copy all layers' weights, which takes as much memory as they do."""
        self._before = [[p.detach().clone() for p in layer.parameters()] for layer in self._layers]

    def before(self, index: int) -> list[Tensor]:
        """The copied weights of a layer, in the order of its parameters, and on their devices now."""
        pairs = zip(self._before[index], self._layers[index].parameters(), strict=True)
        return [weight.to(parameter.device) for weight, parameter in pairs]

    @torch.no_grad()
    def moved(self, index: int) -> list[Tensor]:
        """The change of each of a layer's parameters since `keep`."""
        return [now - before for now, before in zip(self._layers[index].parameters(), self.before(index), strict=True)]

    def drop(self) -> None:
        """Drop the copies."""
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """The copies, if there are any."""
        return {"before": [[weight.cpu() for weight in weights] for weights in self._before]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them, each on its parameter's device."""
        self._before = [
            [
                weight.to(parameter.device, copy=True)
                for weight, parameter in zip(weights, layer.parameters(), strict=True)
            ]
            for weights, layer in zip(state["before"], self._layers, strict=False)
        ]

"""Layer tailoring: the same K weights of each layer, drawn once, while recording and while freezing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from predictor.errors import UsageError
from predictor.layers.layer import Layer

_SEEDS = 1 << 32


@dataclass(frozen=True)
class SampleSpec:
    """How layers are sampled. It is stored with every trajectory and every predictor, and the two must agree."""

    weights: int = 256
    """Weights sampled from each layer (K)."""
    snapshots: int = 60
    """Snapshots over a whole training, evenly spread. The one before the first step is not counted."""
    seed: int = 0
    """Seed of the sampled positions, from 0 to below 2**32."""

    def __post_init__(self) -> None:
        if self.weights < 1 or self.snapshots < 1:
            raise UsageError(f"{self}: weights and snapshots count from 1")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"seed={self.seed}: give a whole number from 0 to {_SEEDS - 1}")

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a snapshot is taken after `step` optimizer steps of `total_steps`. True at step 0."""
        return step == 0 or self.taken(step, total_steps) > self.taken(step - 1, total_steps)

    def taken(self, step: int, total_steps: int) -> int:
        """Snapshots taken up to and including `step`, without the one at step 0. At most one a step."""
        return step if total_steps <= self.snapshots else step * self.snapshots // total_steps


def thinned(values: Tensor, weights: int) -> Tensor:
    """`weights` of the sampled weights in the last dimension, evenly spaced.

    A layer's sampled weights come matrix by matrix, so that the first ones would all be of its first matrix.
    """
    recorded = values.shape[-1]
    if weights == recorded:
        return values
    return values[..., torch.arange(weights, device=values.device) * recorded // weights]


class LayerSampler:
    """Reads K fixed positions of every layer.

    Positions are drawn without replacement from a layer's weight matrices, which are its parameters of two or more
    dimensions, or from all its parameters if it has no matrix. A layer with fewer than K weights gives all of them, in
    one random order that is repeated until there are K. Positions depend only on `spec`, on the layer's index and on
    its size.

    Where a part of a layer trains, as an adapter beside a weight, only that part is sampled: the rest would hide its
    motion. A layer of which nothing trains is sampled as a whole. One without weights, as of integers alone, gives
    zeros.
    """

    def __init__(self, layers: Sequence[Layer], spec: SampleSpec) -> None:
        self.spec = spec
        self._layers = layers
        self._drawn = [self._draw(index, _sampled_of(layer)) for index, layer in enumerate(layers)]

    @property
    def sizes_L(self) -> list[int]:
        """How many weights each layer holds, without those that do not train beside others that do."""
        return [_size_of(layer) for layer in self._layers]

    @torch.no_grad()
    def sample(self, layer: int) -> Tensor:
        """The sampled weights of one layer now: weights_K, float32, on the layer's device."""
        return self._drawn[layer].read()

    def sample_all(self) -> Tensor:
        """Every layer's sampled weights now: weights_LK, float32, on the first layer's device."""
        rows = [self.sample(layer) for layer in range(len(self._layers))]
        return torch.stack([row.to(rows[0].device) for row in rows])

    def follow(self) -> list[int]:
        """Draw anew where another part of a layer trains by now. Returns the indices of these layers."""
        changed = []
        for index, layer in enumerate(self._layers):
            sampled = _sampled_of(layer)
            if _trains(layer) and [*map(id, sampled)] != [*map(id, self._drawn[index].parameters)]:
                self._drawn[index] = self._draw(index, sampled)
                changed.append(index)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Which of each layer's parameters are sampled."""
        return {"sampled": [_numbers(drawn.parameters, layer) for drawn, layer in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sample what was sampled then."""
        for index, (numbers, (drawn, layer)) in enumerate(zip(state["sampled"], self._pairs, strict=True)):
            if numbers != _numbers(drawn.parameters, layer):
                own = list(layer.parameters())
                self._drawn[index] = self._draw(index, [own[number] for number in numbers])

    @property
    def _pairs(self) -> list[tuple["_Drawn", Layer]]:
        return list(zip(self._drawn, self._layers, strict=True))

    def _draw(self, index: int, parameters: list[nn.Parameter]) -> "_Drawn":
        return _Drawn(parameters, self.spec, index, self._layers[index].own[0].device)


class _Drawn:
    """Fixed positions in a layer's parameters."""

    def __init__(self, parameters: list[nn.Parameter], spec: SampleSpec, index: int, device: torch.device) -> None:
        self.parameters = parameters
        self._weights = spec.weights
        self._device = device
        sizes = [math.prod(_shape_of(parameter)) for parameter in parameters]
        positions_K = _draw(sum(sizes), spec, index) if parameters else torch.empty(0, device="cpu")
        self._indices: list[tuple[Tensor, ...]] = []  # one tensor a dimension, where a parameter has a position
        start = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            inside = positions_K[(positions_K >= start) & (positions_K < start + size)] - start
            where = torch.unravel_index(inside, _shape_of(parameter))
            self._indices.append(tuple(part.to(parameter.device) for part in where))
            start += size

    def read(self) -> Tensor:
        """The weights at these positions: weights_K, float32."""
        parts = []
        for number, parameter in enumerate(self.parameters):
            indices = self._indices[number]
            if not len(indices[0]):
                continue
            if indices[0].device != parameter.device:  # the model has moved
                indices = self._indices[number] = tuple(part.to(parameter.device) for part in indices)
            # Every backend has this kernel, and it copies nothing, whatever the memory format. `take` is not on MPS.
            parts.append(_read(_numbers_of(parameter), indices))
        if not parts:
            return torch.zeros(self._weights, dtype=torch.float32, device=self._device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read(numbers: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    if numbers.is_floating_point() and numbers.element_size() == 1:  # older PyTorch cannot index float8
        return numbers.view(torch.uint8)[indices].view(numbers.dtype).float()
    return numbers[indices].float()


def _numbers_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's real numbers, in one dimension at least; all of them where FSDP2 has sharded it."""
    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    value = torch.view_as_real(value) if value.is_complex() else value
    return value.reshape(1) if value.dim() == 0 else value


def _shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of `_numbers_of`."""
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape) or (1,)


def _trains(layer: Layer) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _sampled_of(layer: Layer) -> list[nn.Parameter]:
    """The parameters of a layer that are sampled."""
    weights = [parameter for parameter in layer.parameters() if parameter.numel() and _can_train(parameter)]
    training = [parameter for parameter in weights if parameter.requires_grad] or weights
    return [parameter for parameter in training if parameter.dim() >= 2] or training


def _can_train(parameter: nn.Parameter) -> bool:
    """Whether a parameter trains or could: it is no integer, nor of a type of its own that hides integers."""
    plain = type(parameter) is nn.Parameter or hasattr(parameter, "full_tensor")
    return parameter.requires_grad or (plain and (parameter.is_floating_point() or parameter.is_complex()))


def _size_of(layer: Layer) -> int:
    training = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    return training or layer.size


def _numbers(parameters: Sequence[nn.Parameter], layer: Layer) -> list[int]:
    sampled = set(map(id, parameters))
    return [number for number, parameter in enumerate(layer.parameters()) if id(parameter) in sampled]


def _draw(size: int, spec: SampleSpec, index: int) -> Tensor:
    # Drawing must not change the training's random numbers, nor depend on the user's default device.
    generator = torch.Generator("cpu").manual_seed(spec.seed * 1_000_003 + index)
    if size > 16 * spec.weights:  # a permutation of a hundred million weights takes seconds and a gigabyte
        drawn: dict[int, None] = {}
        while len(drawn) < spec.weights:
            more = torch.randint(size, (spec.weights,), generator=generator, device="cpu")
            drawn.update(dict.fromkeys(more.tolist()))
        return torch.tensor(list(drawn)[: spec.weights], device="cpu")
    order = torch.randperm(size, generator=generator, device="cpu")[: spec.weights]
    return order.repeat(-(-spec.weights // len(order)))[: spec.weights]

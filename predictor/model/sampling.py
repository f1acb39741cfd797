"""Layer tailoring: the same K weights of a layer, drawn once, at collect time and at run time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from predictor.errors import UsageError
from predictor.layers.layer import Layer

_SEEDS = 1 << 32


@dataclass(frozen=True)
class SampleSpec:
    """How a layer's weights are watched. It travels with every trajectory and every predictor; the two must agree."""

    weights: int = 256
    """Weights sampled from each layer (K)."""
    snapshots: int = 60
    """Snapshots over a whole training, evenly spread, besides the one before the first step."""
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
        """Snapshots taken up to and with `step`, the one at step 0 not counted. At most one a step."""
        return step if total_steps <= self.snapshots else step * self.snapshots // total_steps


def thinned(values: Tensor, weights: int) -> Tensor:
    """`weights` of the sampled weights in the last dimension, evenly spaced.

    A layer's sampled weights stand matrix by matrix, so that the first ones would all be of its first matrix.
    """
    recorded = values.shape[-1]
    if weights == recorded:
        return values
    return values[..., torch.arange(weights, device=values.device) * recorded // weights]


class LayerSampler:
    """Reads K fixed positions of every layer.

    Positions are drawn from a layer's weight matrices (parameters of two or more dimensions; from all its parameters
    where it has none), without replacement. A layer with fewer than K weights gives every weight, again and again in
    the same random order, until there are K. Positions depend on `spec`, on the layer's place and on its size alone.
    """

    def __init__(self, layers: Sequence[Layer], spec: SampleSpec) -> None:
        self.spec = spec
        self._parameters = [_weights_of(layer) for layer in layers]
        self._positions = [
            _split(_draw(sum(p.numel() for p in parameters), spec, place), parameters)
            for place, parameters in enumerate(self._parameters)
        ]

    @torch.no_grad()
    def sample(self, layer: int) -> Tensor:
        """The sampled weights of one layer now: weights_K, float32, on the layer's device."""
        pairs = zip(self._parameters[layer], self._positions[layer], strict=True)
        parts = [_whole(parameter).take(position).float() for parameter, position in pairs if position.numel()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sample_all(self) -> Tensor:
        """Every layer's sampled weights now: weights_LK, float32, on the first layer's device."""
        rows = [self.sample(layer) for layer in range(len(self._parameters))]
        return torch.stack([row.to(rows[0].device) for row in rows])


def _whole(parameter: nn.Parameter) -> Tensor:
    """The parameter itself, or all of it where FSDP2 has it in pieces on several machines."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _weights_of(layer: Layer) -> list[nn.Parameter]:
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() >= 2]
    return matrices or list(layer.parameters())


def _draw(size: int, spec: SampleSpec, place: int) -> Tensor:
    # A generator of its own: drawing must not move the training's random numbers.
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + place)
    if size > 16 * spec.weights:  # a permutation of a hundred million weights takes seconds and a gigabyte
        drawn: dict[int, None] = {}
        while len(drawn) < spec.weights:
            drawn.update(dict.fromkeys(torch.randint(size, (spec.weights,), generator=generator).tolist()))
        return torch.tensor(list(drawn)[: spec.weights])
    order = torch.randperm(size, generator=generator)[: spec.weights]
    return order.repeat(-(-spec.weights // len(order)))[: spec.weights]


def _split(positions_K: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Positions in the concatenation of `parameters`, as positions in each of them."""
    parts, start = [], 0
    for parameter in parameters:
        inside = positions_K[(positions_K >= start) & (positions_K < start + parameter.numel())]
        parts.append((inside - start).to(parameter.device))
        start += parameter.numel()
    return parts

"""Layer tailoring: the same K weights of each layer, drawn once, while recording and while freezing."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    def __init__(self, layers: Sequence[Layer], spec: SampleSpec) -> None:
        self.spec = spec
        self._parameters = [_weights_of(layer) for layer in layers]
        self._positions = [
            _split(_draw(sum(p.numel() for p in parameters), spec, index), parameters)
            for index, parameters in enumerate(self._parameters)
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
    """The parameter itself, or all of it where FSDP2 has sharded it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _weights_of(layer: Layer) -> list[nn.Parameter]:
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() >= 2]
    return matrices or list(layer.parameters())


def _draw(size: int, spec: SampleSpec, index: int) -> Tensor:
    # Drawing must not change the training's random numbers.
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + index)
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

"""What the gradients of a few batches say of each layer before the first step."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.layers.layer import Layer
from predictor.policies.measuring.gradients import real_of, to_host

BATCHES = 8
"""Batches that are looked at. Half of them are the other half's noise."""


@dataclass(frozen=True)
class FirstLook:
    """Norms of each layer's gradients over B batches, in evaluation mode and with no step taken.

    With g_b the gradient of batch b, `mean` is the sum over b of g_b, over B; `noise` is the same with every other
    batch's sign turned, so that what the batches agree on cancels.
    """

    batches: int
    """B."""
    mean_l1_L: tuple[float, ...]
    """Sum of the absolute values of the mean gradient."""
    noise_l1_L: tuple[float, ...]
    """The same of the noise."""
    mean_l2_L: tuple[float, ...]
    """Euclidean norm of the mean gradient."""
    noise_l2_L: tuple[float, ...]
    """The same of the noise."""
    weight_l1_L: tuple[float, ...]
    """Sum of the absolute values of the weights."""
    weight_l2_L: tuple[float, ...]
    """Euclidean norm of the weights."""
    size_L: tuple[int, ...]
    """Number of weights."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> "FirstLook":
        """The figures that `as_dict` returned."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in figures.items()})

    @property
    def signal_L(self) -> tuple[float, ...]:
        """The L1 norm of the mean gradient less that of the noise, at least 0: what all batches ask of a layer."""
        return tuple(max(0.0, mean - noise) for mean, noise in zip(self.mean_l1_L, self.noise_l1_L, strict=True))


def look_at(
    model: nn.Module, layers: Sequence[Layer], losses: Iterable[Tensor], batches: int = BATCHES
) -> FirstLook | None:
    """Look at the gradients of a model's first batches. The model, its gradients and the random state stay as they are.

    Args:
        model: the model, without what is wrapped around it.
        layers: those that are looked at.
        losses: the loss of one batch after the other, each computed when it is asked for.
        batches: how many are taken.

    Returns:
        None where there are fewer than two losses, or where a gradient is not a finite number.

    Raises:
        UsageError: a loss that hangs on no weight.
    """
    own = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    sums = [[torch.zeros_like(p) for p in each] for each in own]
    turned = [[torch.zeros_like(p) for p in each] for each in own]
    flat = [p for each in own for p in each]
    count = 0
    with isolated(model, gradients=True), torch.backends.cudnn.flags(enabled=False):  # its RNNs refuse evaluation mode
        for loss in islice(losses, batches - batches % 2):
            if not loss.requires_grad:
                raise UsageError("the loss hangs on no weight: give look() losses with their graph, not .item() numbers")
            found = torch.autograd.grad(loss, flat, allow_unused=True)
            _add(sums, found, 1)
            _add(turned, found, 1 if count % 2 == 0 else -1)
            count += 1
            del loss, found
    return _look(layers, sums, turned, count) if count > 1 else None


@torch.no_grad()
def _add(sums: list[list[Tensor]], found: Sequence[Tensor | None], sign: int) -> None:
    gradients: Iterator[Tensor | None] = iter(found)
    for each in sums:
        for total in each:
            gradient = next(gradients)
            if gradient is not None:
                total.add_(gradient.to_dense() if gradient.is_sparse else gradient, alpha=sign)


@torch.no_grad()
def _look(
    layers: Sequence[Layer], sums: list[list[Tensor]], turned: list[list[Tensor]], count: int
) -> FirstLook | None:
    weights = [list(layer.parameters()) for layer in layers]
    kinds = [(each, scale) for each, scale in ((sums, 1 / count), (turned, 1 / count), (weights, 1.0))]
    devices = [layer.own[0].device for layer in layers]
    rows = [
        torch.stack([_l1(values, device) * scale, _l2(values, device) * scale])
        for each, scale in kinds
        for values, device in zip(each, devices, strict=True)
    ]
    table = to_host(rows).double()
    if not bool(table.isfinite().all()):
        return None
    (mean, noise, weight) = (part.T.tolist() for part in table.split(len(layers)))
    sizes = tuple(layer.size for layer in layers)
    return FirstLook(
        count, *map(tuple, (mean[0], noise[0], mean[1], noise[1], weight[0], weight[1])), sizes
    )


def _l1(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for value in values:
        total += real_of(value).abs().sum().to(device)
    return total


def _l2(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=device)
    for value in values:
        total += real_of(value).square().sum().to(device)
    return total.sqrt()

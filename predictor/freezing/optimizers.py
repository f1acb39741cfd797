"""The optimizers of a training: one or several, as the user gives them."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer


def as_optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers, in a list. Raises UsageError for anything else."""
    if isinstance(given, Optimizer):
        return [given]
    optimizers: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, dict) else [given]
    odd = [type(each).__name__ for each in optimizers if not hasattr(each, "param_groups")]
    if odd or not optimizers:
        what = f"an optimizer of type {odd[0]}" if odd else "no optimizer"
        raise UsageError(
            f"{what}: give a torch.optim.Optimizer, or a list of them; of an object that holds one, such as a learning "
            "rate schedule of your own, the optimizer inside"
        )
    return optimizers


class JointOptimizer:
    """Several optimizers as one that policies may look at: the parameter groups of all, and hooks on each.

    Args:
        optimizers: two or more.
        layers: those that may freeze. The optimizers that hold most of them come first.
    """

    def __init__(self, optimizers: Sequence[Optimizer], layers: Sequence[Layer]) -> None:
        sizes = {id(parameter): parameter.numel() for layer in layers for parameter in layer.parameters()}

        def held(optimizer: Optimizer) -> int:
            return sum(sizes.get(id(each), 0) for group in optimizer.param_groups for each in group["params"])

        self.optimizers = sorted(optimizers, key=held, reverse=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, as they are now."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all, by parameter."""
        return {key: value for optimizer in self.optimizers for key, value in optimizer.state.items()}


def joint(optimizers: Sequence[Optimizer], layers: Sequence[Layer]) -> Optimizer:
    """What policies are given: the optimizer, or of several a `JointOptimizer`."""
    return optimizers[0] if len(optimizers) == 1 else cast(Optimizer, JointOptimizer(optimizers, layers))


def optimizers_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers in what `joint` returned."""
    return optimizer.optimizers if isinstance(optimizer, JointOptimizer) else [optimizer]

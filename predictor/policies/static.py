"""A fixed prefix, frozen from the start."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class StaticPolicy(FreezePolicy):
    """Freezes a fixed prefix before the first step and never changes it.

    Paper: none; what users do by hand, and `freeze=N` of several trainers.

    Rule: layers 0 to n - 1 are frozen at every step.

    Signal: none.

    Differs: nothing.

    Cost: none.

    Made for pretrained weights. From scratch it keeps a random prefix. Give at most one of the three arguments.

    Args:
        share: the prefix's share of the layers, rounded to whole layers. 0.5 by default.
        layers: the number of layers in the prefix.
        last: the number of layers behind the prefix, which train beside the head.
    """

    def __init__(self, share: float | None = None, layers: int | None = None, last: int | None = None) -> None:
        options = {"share": share, "layers": layers, "last": last}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{', '.join(given)}: give one of them")
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"share={share}: give a share of the layers, from 0 to 1")
        if layers is not None and layers < 0:
            raise UsageError(f"layers={layers}: give a number of layers, from 0")
        if last is not None and last < 0:
            raise UsageError(f"last={last}: give a number of layers, from 0")
        self.share = 0.5 if share is None else share
        self.layers = layers
        self.last = last

    def due(self, step: int, total_steps: int) -> bool:
        """Only before the first step."""
        return step == 0

    def decide(self, view: View) -> frozenset[int]:
        """The first `layers`, or a `share` of all, or all but the `last` ones."""
        found = len(view.layers)
        for name, count in (("layers", self.layers), ("last", self.last)):
            if count is not None and count > found:
                raise UsageError(f"{name}={count}: the model has {found} layers that may freeze")
        if self.last is not None:
            return frozenset(range(found - self.last))
        return frozenset(range(round(self.share * found) if self.layers is None else self.layers))

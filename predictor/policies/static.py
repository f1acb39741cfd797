"""The first layers frozen from the start."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class StaticPolicy(FreezePolicy):
    """Freezes a fixed front before the first step and never changes it.

    Paper: none; what users do by hand, and `freeze=N` of several trainers. Rule: layers 0 .. n-1 at every step.
    Signal: none. Differs: not at all. Cost: none. Meant for pretrained weights; from scratch it keeps a random front.

    One of three says how many: share, the front's share of the layers, rounded to whole layers, 0.5 by default; layers,
    their number; last, the number of layers behind the front, which train on beside the head.
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
        """Before the first step alone."""
        return step == 0

    def decide(self, view: View) -> frozenset[int]:
        """The first `layers`, or that share of them, or all but the `last` ones."""
        found = len(view.layers)
        for name, count in (("layers", self.layers), ("last", self.last)):
            if count is not None and count > found:
                raise UsageError(f"{name}={count}: the model has {found} layers that may freeze")
        if self.last is not None:
            return frozenset(range(found - self.last))
        return frozenset(range(round(self.share * found) if self.layers is None else self.layers))

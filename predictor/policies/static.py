"""The first layers frozen from the start."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class StaticPolicy(FreezePolicy):
    """Freezes a fixed front before the first step and never changes it.

    Paper: none; what users do by hand, and `freeze=N` of several trainers. Rule: layers 0 .. n-1 at every step.
    Signal: none. Differs: not at all. Cost: none. Meant for pretrained weights; from scratch it keeps a random front.

    share: the front's share of the layers, rounded to whole layers. layers: their number instead.
    """

    def __init__(self, share: float = 0.5, layers: int | None = None) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"share={share}: give a share of the layers, from 0 to 1")
        if layers is not None and layers < 0:
            raise UsageError(f"layers={layers}: give a number of layers, from 0")
        self.share = share
        self.layers = layers

    def decide(self, view: View) -> frozenset[int]:
        """The first `layers`, or that share of them."""
        count = round(self.share * len(view.layers)) if self.layers is None else self.layers
        if count > len(view.layers):
            raise UsageError(f"layers={count}: the model has {len(view.layers)} layers that may freeze")
        return frozenset(range(count))

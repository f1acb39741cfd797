"""A prefix that grows at random times: the control that shows whether a method's times matter."""

import torch

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class RandomPolicy(FreezePolicy):
    """Freezes a prefix that grows by one layer at each of several random times.

    Paper: none; a control.

    Rule: n = round(share * L) moments are drawn uniformly from the whole training. At each of them one more layer
    freezes, front to back.

    Signal: chance.

    Differs: nothing.

    Cost: none.

    Args:
        share: the share of the layers that are frozen at the end. Take that of the method it is compared with.
        seed: the seed of the moments.
    """

    def __init__(self, share: float = 0.5, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"share={share}: give a share of the layers, from 0 to 1")
        self.share = share
        self.seed = seed

    def decide(self, view: View) -> frozenset[int]:
        """As many layers as moments have passed."""
        # Drawn at each call by a generator of its own: there is nothing to save, and the training's random numbers do
        # not change.
        generator = torch.Generator("cpu").manual_seed(self.seed)
        moments = torch.rand(round(self.share * len(view.layers)), generator=generator, device="cpu")
        return frozenset(range(int((moments <= view.progress).sum())))

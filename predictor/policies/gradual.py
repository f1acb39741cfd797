"""A frozen prefix that shrinks from the back."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class GradualPolicy(FreezePolicy):
    """Freezes all layers before the first step and unfreezes one group after another, the last one first.

    Paper: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ACL 2018), section 3.3.
    fastai's `freeze_to` serves the same purpose, as does Lightning's `BackboneFinetuning` with a single group.

    Rule: with t the progress, G groups and L layers, k(t) = min(G, floor(G * t / until)) groups have been unfrozen, and
    the first floor(L * (G - k) / G) layers are frozen.

    Signal: time.

    Differs: the paper unfreezes one layer an epoch, whatever the length of the training, and starts with the last one
    beside the head. Here the unfreezing is spread evenly and the head trains alone in the first span. The paper's
    learning rates that fall from layer to layer are left out.

    Cost: none.

    Made for pretrained weights.

    Args:
        until: the progress at which everything trains, above 0 and at most 1.
        groups: how many groups there are, equal in size up to one layer. By default one layer each.
    """

    unfreezes = True

    def __init__(self, until: float = 0.5, groups: int | None = None) -> None:
        if not 0 < until <= 1:
            raise UsageError(f"until={until}: give a progress above 0 and at most 1")
        if groups is not None and groups < 1:
            raise UsageError(f"groups={groups}: give a number of groups, from 1")
        self.until = until
        self.groups = groups

    def decide(self, view: View) -> frozenset[int]:
        """The prefix that is still frozen."""
        layers = len(view.layers)
        groups = layers if self.groups is None else min(self.groups, layers)
        unfrozen = min(groups, int(groups * view.progress / self.until))
        return frozenset(range(layers * (groups - unfrozen) // groups if groups else 0))

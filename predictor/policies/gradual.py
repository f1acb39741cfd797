"""A frozen front that thaws from the back to the front."""

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class GradualPolicy(FreezePolicy):
    """Freezes all layers before the first step and thaws one group after another, the last one first.

    Paper: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (ACL 2018), section 3.3;
    also what fastai's `freeze_to` is used for, and with a single group Lightning's `BackboneFinetuning`. Rule: with t
    the progress, G groups and L layers, k(t) = min(G, floor(G * t / until)) groups have thawed, and the first
    floor(L * (G - k) / G) layers are frozen. Signal: time. Differs: the paper thaws one layer an epoch, whatever the
    length of the training, and starts with the last one beside the head; here the thawing is spread evenly, the head
    trains alone in the first of its spans, and the paper's learning rates that fall from layer to layer are left out.
    Cost: none. Meant for pretrained weights.

    until: the progress at which everything trains, above 0 and at most 1. groups: how many groups thaw, equal in size
    but for one layer where they do not divide evenly; one layer each by default.
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
        """The front that has not thawed yet."""
        layers = len(view.layers)
        groups = layers if self.groups is None else min(self.groups, layers)
        thawed = min(groups, int(groups * view.progress / self.until))
        return frozenset(range(layers * (groups - thawed) // groups if groups else 0))

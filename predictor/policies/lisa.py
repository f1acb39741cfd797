"""LISA: a few layers drawn at random train at a time."""

import torch

from predictor.errors import UsageError
from predictor.policies.base import FreezePolicy, View


class LisaPolicy(FreezePolicy):
    """Trains the first layer, the head and a few layers drawn at random every few steps.

    Paper: LISA (Pan et al., NeurIPS 2024, arXiv 2403.17919), which saves memory in fine-tuning language models.

    Rule: every `every` steps, `layers` layers are drawn uniformly from those behind the first, and train. The first
    layer (the embeddings) and the head always train. All else is frozen.

    Signal: chance.

    Differs: the layers are those of `layers_of`, where the authors draw whole transformer blocks (use `layers_of(model,
    granularity="block")` for those). An unfrozen layer starts with fresh optimizer state. Since the first layer trains,
    no backward pass ends early.

    Cost: none.

    Args:
        layers: how many train besides the first and the head.
        every: optimizer steps between draws.
        seed: the seed of the draws.
    """

    unfreezes = True

    def __init__(self, layers: int = 2, every: int = 20, seed: int = 0) -> None:
        if layers < 1:
            raise UsageError(f"layers={layers}: give a number of layers, from 1")
        if every < 1:
            raise UsageError(f"every={every}: give a number of optimizer steps, from 1")
        self.layers = layers
        self.every = every
        self.seed = seed

    def decide(self, view: View) -> frozenset[int]:
        """All but the first layer and those drawn for these steps."""
        # A generator of its own for each draw: the training's random numbers do not change, and a draw depends on its
        # number alone, so that there is nothing to save.
        seed = (self.seed * 1_000_003 + view.step // self.every) % 2**64
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(view.layers) - 1, generator=generator, device="cpu") + 1
        return frozenset(order[self.layers :].tolist())

"""Dynamic sparse masks: a changing set of the weights of dense and convolution layers is held at zero."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from collect.training.loop import Hook, Training
from data.sources.base import generator_for
from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_HALVED, _LAST = 9 / 16, 3 / 4
"""Progress from which half as many weights move, and from which none do: epochs 90 and 120 of 160."""


class SparseMasks(Hook):
    """Holds a share of each layer's weights at zero from the start, and prunes and grows weights during training.

    Paper: MEST (Yuan et al., NeurIPS 2021, arXiv 2110.14032). Layer Freezing & Data Sieving (2209.11204) builds on it,
    with random masks at the start that do not change in frozen layers.

    Rule, as in MEST's public code: at intervals, the active weights of least magnitude in each layer are pruned, and as
    many others, drawn at random, are grown from zero: a fifth of the active weights at first, a tenth from 9/16 of the
    training on, none from 3/4 on. Every layer has the same sparsity, rather than more in large layers (ERK), so that a
    layer's share of the cost stays what it is, and a freezing schedule for the dense network fits the sparse one.
    Biases, norms, embeddings, the head, and a first layer that is a convolution are dense.

    Our reading: `every` is one epoch, for trainings of tens of epochs, where the code has 5 of 160. Only weights that
    were masked before can grow.

    Differs: the paper can add the gradient to the magnitude, with a factor that is 0 in the code by default. Weights
    keep their dense initial scale.

    A masked weight has no gradient, so that it does not count for clipping and momentum. A pruned weight loses its
    optimizer state: with any optimizer it stays exactly zero. A frozen layer keeps weights and mask. Put this hook
    before the one that freezes, which then sees masked layers from the start.

    Cost: one elementwise operation on each gradient, and a sort of each layer's active weights at each change. Dense
    kernels multiply the zeros too: nothing is faster. The masks are for training from scratch: random masks destroy
    most of what pretrained weights know.

    Args:
        sparsity: The share of each layer's weights that is masked.
        every: Epochs between changes.
        moved: The share of the active weights that move at each change.

    Raises:
        UsageError: A setting that cannot work; and, at the start, a model without a maskable layer.
    """

    def __init__(self, sparsity: float, every: int = 1, moved: float = 0.2) -> None:
        if not 0 < sparsity < 1:
            raise UsageError(f"sparsity={sparsity}: give a share of the weights, above 0 and below 1")
        if every < 1:
            raise UsageError(f"every={every}: give the epochs between changes of the masks, from 1")
        if not 0 <= moved <= 1:
            raise UsageError(f"moved={moved}: give a share of the active weights, from 0 to 1")
        self.sparsity = sparsity
        self.every = every
        self.moved = moved
        self.changes = 0
        """How often the masks were changed."""

    @torch.no_grad()
    def on_start(self, training: Training) -> None:
        """Draw the masks, and set the masked weights to zero."""
        self._training = training
        self._weights = _maskable(training)
        if not self._weights:
            raise UsageError(
                f"sparsity={self.sparsity}: {training.workload.name} has no dense or convolution layer between a first "
                "convolution and its head that could be masked: train it without masks"
            )
        self.masked: dict[str, Tensor] = {}
        """True where a weight is held at zero, by parameter name."""
        self._handles = []
        for name, weight in self._weights.items():
            kept = max(1, round((1 - self.sparsity) * weight.numel()))
            masked_N = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
            masked_N[self._lot(weight.numel(), name)[:kept]] = False
            self.masked[name] = _like(weight, masked_N)
            weight.masked_fill_(self.masked[name], 0.0)
            handle = weight.register_hook(partial(self._without_masked, name))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Change the masks of the layers that are not frozen, in the first step of an interval."""
        # In the last step of the interval before, a policy may freeze a layer right after this hook. Its pruned weights
        # would be lost, and the grown ones would stay at zero.
        done = training.step - 1
        share = self._share_at(done / training.total_steps)
        if done == 0 or done % (self.every * training.steps_per_epoch) or not share:
            return
        for name, weight in self._weights.items():
            if weight.requires_grad:
                self._change(name, weight, share)
        self.changes += 1

    def on_end(self, training: Training) -> None:
        """Let the gradients through again."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The masks, and how often they were changed."""
        return {"masked": {name: masked.cpu() for name, masked in self.masked.items()}, "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.masked = {name: masked.to(self._weights[name].device) for name, masked in state["masked"].items()}
        self.changes = state["changes"]

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers that go into a trial's result. Here sparsity is a share of all the model's weights."""
        held = sum(int(masked.sum()) for masked in self.masked.values())
        size = sum(parameter.numel() for parameter in self._training.model.parameters())
        return {"sparsity": held / size, "changes": self.changes}

    def thinned(self, flops: LayerFlops) -> LayerFlops:
        """Return the FLOPs of the training's layers without the products with masked weights."""
        layers = zip(self._densities(), flops.forward_L, flops.weightless_L, flops.entry_L, strict=True)
        left = [(weightless + d * (forward - weightless), d * entry) for d, forward, weightless, entry in layers]
        forward_L, entry_L = (tuple(map(round, column)) for column in zip(*left, strict=True))
        return LayerFlops(forward_L, flops.weightless_L, entry_L, flops.head)

    def _densities(self) -> list[float]:
        """The active share of each layer's maskable weights; 1 for a layer without any."""
        names = {id(weight): name for name, weight in self._weights.items()}
        densities = []
        for layer in self._training.layers:
            own = [self.masked[names[id(p)]] for p in layer.parameters() if id(p) in names]
            held, size = sum(int(masked.sum()) for masked in own), sum(masked.numel() for masked in own)
            densities.append(1 - held / size if size else 1.0)
        return densities

    def _share_at(self, progress: float) -> float:
        if progress >= _LAST:
            return 0.0
        return self.moved if progress < _HALVED else self.moved / 2

    def _change(self, name: str, weight: nn.Parameter, share: float) -> None:
        """Prune the active weights of least magnitude, of equal ones the first, and grow as many."""
        masked_N, magnitude_N = self.masked[name].flatten().clone(), weight.flatten().abs()
        active_A, idle_I = (~masked_N).nonzero().flatten(), masked_N.nonzero().flatten()
        count = min(round(share * len(active_A)), len(idle_I))
        pruned = active_A[torch.argsort(magnitude_N[active_A], stable=True)[:count]]
        grown = idle_I[self._lot(len(idle_I), name)[:count].to(weight.device)]
        masked_N[pruned], masked_N[grown] = True, False
        self.masked[name] = _like(weight, masked_N)
        weight.masked_fill_(self.masked[name], 0.0)
        for value in self._training.optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(self.masked[name], 0.0)

    def _without_masked(self, name: str, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self.masked[name], 0.0)

    def _lot(self, size: int, name: str) -> Tensor:
        """The numbers 0 to size - 1 in a random order, by the training's seed and step and the weight's name alone."""
        keys = ("sparse masks", self._training.seed, self._training.step, name)
        return torch.randperm(size, generator=generator_for(*keys))


def _maskable(training: Training) -> dict[str, nn.Parameter]:
    """The maskable weights by parameter name, in the model's order."""
    layered = {id(p) for layer in training.layers for p in layer.parameters()}
    first = [module for module in training.layers[0].modules if isinstance(module, _CONVOLUTIONS)]
    layered -= {id(p) for module in first for p in module.parameters()}
    found = {}
    for name, parameter in training.model.named_parameters():
        owner, _, own = name.rpartition(".")
        dense = isinstance(training.model.get_submodule(owner), (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS))
        # torch.nn's attention holds the weights of three dense layers in one parameter of its own.
        if dense and own in ("weight", "in_proj_weight") and id(parameter) in layered and parameter.requires_grad:
            found[name] = parameter
    return found


def _like(weight: Tensor, masked_N: Tensor) -> Tensor:
    """masked_N, in the order of `weight.flatten()`, in the shape and memory format of the weight."""
    return torch.empty_like(weight, dtype=torch.bool).copy_(masked_N.view(weight.shape))

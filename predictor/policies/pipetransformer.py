"""PipeTransformer's freezing: a prefix that takes a fixed share of the layers left at every epoch."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.gradients import gradients, interval_ends, whole


class PipeTransformerPolicy(FreezePolicy):
    """Freezes a prefix that grows by a share of the layers left, at the end of each epoch.

    Paper: PipeTransformer (He et al., ICML 2021, arXiv 2102.03161), made to move freed memory between pipeline stages.

    Rule: after epoch T the first ceil(L (1 - (1 - alpha)^T)) of L layers are frozen. When adaptive, no more than come
    before the active layer with the smallest gradient.

    Signal: time; when adaptive, gradients too.

    Differs: only the freezing is here, not the pipeline. Our reading of "the smallest gradient" is the least sum, over
    the epoch's steps, of the L2 norm of a layer's gradient. The head is not counted.

    Cost: none; when adaptive, the norms of the active layers' gradients at each step.

    Args:
        alpha: the share of the layers left that an epoch freezes, above 0 and below 1. The authors' code has 1/3 for
            CIFAR-100 and .07 for ImageNet.
        adaptive: let gradients limit the prefix.
        epochs: how many epochs the training has.
    """

    def __init__(self, alpha: float = 1 / 3, adaptive: bool = False, epochs: int = 10) -> None:
        if not 0 < alpha < 1:
            raise UsageError(f"alpha={alpha}: give a share above 0 and below 1")
        if epochs < 1:
            raise UsageError(f"epochs={epochs}: give the number of epochs of the training, from 1")
        self.alpha = alpha
        self.adaptive = adaptive
        self.epochs = epochs
        self._norms_L: Tensor | None = None

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Keep a parameter, by whose device the norms are added up: the model may be moved later."""
        self._parameter = next(layers[0].parameters())

    @torch.no_grad()
    def observe(self, view: View) -> None:
        """Add the norms of the active layers' gradients to those of the epoch."""
        if not self.adaptive:
            return
        device = self._parameter.device
        norms = dict.fromkeys(range(len(view.layers)), torch.zeros((), device=device))
        for index in view.active:
            if grads := gradients(view.layers[index]):
                norms[index] = whole(get_total_norm(grads)).float().to(device)
        norms_L = torch.stack(list(norms.values()))
        # Not finite where a GradScaler had to skip a step, which then is no evidence for any layer.
        norms_L = norms_L.where(norms_L.isfinite().all(), torch.zeros_like(norms_L))
        self._norms_L = norms_L if self._norms_L is None else self._norms_L.to(device) + norms_L

    def due(self, step: int, total_steps: int) -> bool:
        """At the end of each epoch."""
        return interval_ends(step, total_steps, self.epochs)

    def decide(self, view: View) -> frozenset[int]:
        """The frozen layers and, at the end of an epoch, the longer prefix."""
        if not self.due(view.step, view.total_steps) or not view.active:
            return view.frozen
        epoch = view.step * self.epochs // view.total_steps
        # Less a little, for a product that is a whole number but for rounding.
        count = ceil(len(view.layers) * (1 - (1 - self.alpha) ** epoch) - 1e-9)
        if self.adaptive and self._norms_L is not None:
            norms = self._norms_L.tolist()
            count = min(count, min(view.active, key=lambda index: norms[index]))
        self._norms_L = None
        return view.frozen | frozenset(range(count))

    def state_dict(self) -> dict[str, Any]:
        """The epoch's norms so far."""
        return {} if self._norms_L is None else {"norms": self._norms_L.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._norms_L = state["norms"].to(self._parameter.device, copy=True) if "norms" in state else None

"""Whether frozen weights move all the same, as they do where a captured CUDA graph goes on training them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_LOOKED_AT = 8
"""Numbers that are compared of each parameter."""


class FrozenWeights:
    """Compares a few numbers of each frozen parameter with those at the check before.

    Frozen weights have no gradient, so no optimizer moves them. But a CUDA graph that was captured before replays the
    backward pass and the optimizer's step of that time. What an operator has written to, as when a checkpoint is
    loaded, is the user's and is not reported: PyTorch counts such writes, and not those of a replayed graph or to
    `.data`.

    No check waits for a GPU: its answer is read at the next one.
    """

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._before: Tensor | None = None
        self._versions: list[Any] = []
        self._answer: Tensor | None = None
        self._event: Any = None

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Compare these from now on."""
        self._parameters = [parameter for parameter in parameters if parameter.numel() and not parameter.is_meta]
        self._answer = self._event = None
        self._take()

    def moved(self) -> bool:
        """Whether some had moved, as far as is known by now."""
        if not self._parameters:
            return False
        found = self._answer is not None and (self._event is None or self._event.query()) and bool(self._answer)
        before, versions = self._before, self._versions
        self._take()
        self._answer = None
        if before is not None and self._before is not None and versions == self._versions:
            differs = ((self._before != before) & ~(self._before.isnan() & before.isnan())).any()
            if differs.device.type == "cpu":
                return bool(differs)
            self._answer, self._event = _towards_host(differs)
        return found

    @torch.no_grad()
    def _take(self) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p.detach() for p in self._parameters]
        self._versions = [(p._version, p.device, p.dtype) for p in self._parameters]
        parts = [_few(tensor) for tensor in local if tensor.numel() and not tensor.is_meta]
        self._before = torch.cat([part.to(parts[0].device) for part in parts]) if parts else None


def _few(tensor: Tensor) -> Tensor:
    """The first numbers of a tensor, in float32."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    row = tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() else tensor.reshape(1)
    return row[:_LOOKED_AT].float()


def _towards_host(value: Tensor) -> tuple[Tensor, Any]:
    """A number on its way from a device, and the event after which it is there; None where it is there already."""
    kind: Any = getattr(getattr(torch, value.device.type, None), "Event", None)
    if kind is None:
        return value.cpu(), None
    copy, event = value.to("cpu", non_blocking=True), kind()
    event.record()
    return copy, event

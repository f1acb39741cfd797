"""Answers that a GPU gives later, so that nobody waits for its queue."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_UNDER_WAY = 2
"""Sets of answers that are not there yet, before the oldest is waited for."""


class _UnderWay(NamedTuple):
    names: list[str]
    answers: Tensor
    arrived: Any
    """An event of the device; None where the answers lie there still."""


class Deferred:
    """Questions to the model's device, whose answers are read with a later batch: the next one, or the one after."""

    def __init__(self) -> None:
        self._under_way: list[_UnderWay] = []

    def ask(self, questions: list[tuple[str, Tensor]]) -> None:
        """Send tensors that are true or false, with their names, on their way to the processor."""
        if not questions:
            return
        names, tensors = [name for name, _ in questions], [tensor for _, tensor in questions]
        device = tensors[0].device
        answers, arrived = torch.stack([each.to(device) for each in tensors]), None
        kind = None if device.type == "mps" else getattr(torch.get_device_module(device), "Event", None)
        if kind is not None:
            here = torch.empty(answers.shape, dtype=answers.dtype, device="cpu")
            here = here.pin_memory() if device.type == "cuda" else here
            answers, arrived = here.copy_(answers, non_blocking=True), kind()
            arrived.record()
        self._under_way.append(_UnderWay(names, answers, arrived))

    def read(self) -> list[str]:
        """The names of what has turned out true, of those that have arrived."""
        true: list[str] = []
        while self._under_way:
            names, answers, arrived = self._under_way[0]
            if arrived is not None and not arrived.query():
                if len(self._under_way) <= _MOST_UNDER_WAY:
                    break
                arrived.synchronize()
            del self._under_way[0]
            true += [name for name, answer in zip(names, answers.tolist(), strict=True) if answer]
        return true

    def drop(self) -> None:
        """Forget what was asked."""
        self._under_way.clear()

"""Answers that a GPU gives later, so that nobody waits for its queue."""

import torch
from torch import Tensor


class Deferred:
    """Questions to the model's device, whose answers are read with the next batch."""

    def __init__(self) -> None:
        self._answers: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def ask(self, questions: list[Tensor]) -> None:
        """Keep tensors that are true or false on their way to the processor."""
        if not questions:
            return
        device = questions[0].device
        answers = torch.stack([each.to(device) for each in questions])
        self._arrived = None
        if device.type == "cuda":
            here = torch.empty(answers.shape, dtype=answers.dtype, pin_memory=True)
            answers = here.copy_(answers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        self._answers = answers

    def read(self, ids: Tensor | None = None) -> tuple[list[bool], list[int]]:
        """The answers that were asked for last, once, and ids that lie on the device: it is waited for once in all."""
        answers, self._answers = self._answers, None
        if answers is None:
            return [], [] if ids is None else ids.tolist()
        if self._arrived is not None:
            self._arrived.synchronize()  # of the last batch: it has arrived
        if ids is None or answers.device != ids.device:
            return answers.tolist(), [] if ids is None else ids.tolist()
        both = torch.cat([answers.to(torch.int64), ids.to(torch.int64)]).tolist()
        return [bool(each) for each in both[: len(answers)]], both[len(answers) :]

    def drop(self) -> None:
        """Forget what was asked."""
        self._answers = None

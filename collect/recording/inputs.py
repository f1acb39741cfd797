"""The batch on which a recording compares the layers' outputs: kept apart from the user's, and cut to a few samples."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from predictor.errors import UsageError
from predictor.layers.tensors import copied, tensors_in

MOST_SAMPLES = 128
"""More make CKA no better. Its memory grows with their square."""


class ProbeBatch:
    """A copy of the first samples of a batch, on the CPU. Its length is the number of samples.

    Args:
        batch: the inputs of the model: a tensor, a tuple or list of inputs, or a mapping of named ones; for a detector
            a list of images.

    Raises:
        UsageError: no tensor in it, or fewer than four samples.
    """

    def __init__(self, batch: Any) -> None:
        batch = _plain(batch)
        self._listed = _is_listed(batch)
        sizes = [len(batch)] if self._listed else [len(tensor) for tensor in tensors_in(batch) if tensor.dim()]
        size = sizes[0] if sizes else 0
        if size < 4:
            raise UsageError(
                f"probe: a {type(batch).__name__} with {size} samples: give a batch of the model's inputs with at "
                "least 4 samples, which CKA needs; 80 are enough"
            )
        batch = batch[:MOST_SAMPLES] if self._listed else _map(batch, lambda tensor: _first(tensor, size))
        self._batch = copied(_map(batch, Tensor.cpu))
        self._size = min(size, MOST_SAMPLES)
        self._placed: tuple[torch.device, Any] | None = None

    def __len__(self) -> int:
        return self._size

    def fit(self, model: nn.Module) -> None:
        """Leave out what the model has no argument for: the labels of (x, y), a data set's other columns."""
        self._placed = None
        accepted = inspect.signature(model.forward)
        if isinstance(self._batch, dict) and not _binds(accepted, **self._batch):
            self._batch = {name: part for name, part in self._batch.items() if name in accepted.parameters}
        several = isinstance(self._batch, tuple | list) and not self._listed
        if several and not _binds(accepted, *self._batch) and _binds(accepted, self._batch[0]):
            self._batch = self._batch[0]

    def on(self, device: torch.device) -> Any:
        """The batch on a device, as a copy that a model may change. It stays there: to move it means to wait."""
        if self._placed is None or self._placed[0] != device:
            self._placed = device, _map(self._batch, lambda tensor: tensor.to(device))
        return copied(self._placed[1])

    def call(self, model: nn.Module) -> object:
        """The model's output for the batch: named inputs by name, several in their order."""
        batch = self.on(next(model.parameters()).device)
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) and not self._listed else model(batch)

    def state_dict(self) -> dict[str, Any]:
        """The tensors."""
        return {"tensors": list(tensors_in(self._batch))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the samples of another batch: all snapshots of a training have to see the same ones.

        Raises:
            UsageError: the other batch has other parts.
        """
        stored, own = state["tensors"], list(tensors_in(self._batch))
        if len(stored) != len(own):
            raise UsageError(
                f"probe: {len(own)} tensors, and the recording that goes on had {len(stored)}: give the batch that it "
                "began with"
            )
        self._placed = None
        parts: Iterator[Tensor] = iter(stored)
        self._batch = _map(self._batch, lambda _: next(parts).cpu())
        self._size = len(stored) if self._listed else len(next(tensor for tensor in stored if tensor.dim()))


def _binds(accepted: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        accepted.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _is_listed(batch: Any) -> bool:
    """Whether a list holds an image for each sample, as detectors take it, and not the inputs of a model."""
    return isinstance(batch, list) and len(batch) >= 4 and all(isinstance(i, Tensor) and i.dim() == 3 for i in batch)


def _first(tensor: Tensor, size: int) -> Tensor:
    return tensor[:MOST_SAMPLES] if tensor.dim() and len(tensor) == size else tensor


def _plain(value: Any) -> Any:
    """Mappings, such as a tokenizer's answer, as dicts."""
    return dict(value) if isinstance(value, Mapping) else value


def _map(value: Any, change: Any) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)

"""Checkpoints: the whole state of a training in one file, which is read without running code from it."""

import hashlib
import io
import json
import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from collect.training.state import Training, parameter_shapes
from predictor.errors import FileFault
from predictor.shared.files import written_whole

_MAGIC = b"SmartFRZ checkpoint 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_PARTS = {"identity", "training", "hooks"}
_CURE = "remove the file, and the training starts over"


class CheckpointFault(FileFault):
    """A checkpoint that a training cannot resume from: unreadable, damaged, or of another training."""


class Stateful(Protocol):
    """Has a state to resume from."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, None, and lists, tuples and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        ...


class Checkpoint:
    """The file of one training, replaced at every save.

    Args:
        path: The file.
        seconds: Time between saves; 0 saves after every step.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self._seconds = seconds
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, training: Training, hooks: Sequence[Stateful]) -> None:
        """Write the state of a training and its hooks. Raises FileFault when it cannot be written."""
        states = [hook.state_dict() for hook in hooks]
        for hook, state in zip(hooks, states, strict=True):
            _check_plain(state, f"{type(hook).__name__}.state_dict()")
        body = io.BytesIO()
        whole = {"identity": _identity(training, hooks), "training": training.state_dict(), "hooks": states}
        torch.save(whole, body)
        with written_whole(self.path) as part, part.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(body.getbuffer()).digest())
            file.write(body.getbuffer())
        self._saved_at = time.monotonic()

    def load(self, training: Training, hooks: Sequence[Stateful]) -> None:
        """Restore the state in the file. Raises CheckpointFault for a file that is broken, or of another training."""
        whole = _read(self.path)
        _compare(self.path, whole["identity"], _identity(training, hooks))
        training.load_state_dict(whole["training"])
        for hook, state in zip(hooks, whole["hooks"], strict=True):
            hook.load_state_dict(state)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointFault(f"{path}: cannot be read ({error.strerror}): make it readable, or {_CURE}") from error
    head, body = content[: len(_MAGIC)], memoryview(content)[len(_MAGIC) + _DIGEST_BYTES :]
    if head != _MAGIC:
        raise CheckpointFault(f"{path}: is not a checkpoint of this version: {_CURE}")
    if hashlib.sha256(body).digest() != content[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]:
        raise CheckpointFault(f"{path}: the checkpoint is damaged: {_CURE}")
    try:
        whole: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        if set(whole) != _PARTS:
            raise pickle.UnpicklingError(f"its parts are not {_PARTS}")
    except (pickle.UnpicklingError, RuntimeError, TypeError) as error:
        raise CheckpointFault(f"{path}: holds something else than a checkpoint: {_CURE}") from error
    return whole


def _identity(training: Training, hooks: Sequence[Stateful]) -> str:
    """What two trainings must have in common for one to resume from the other's state."""
    facts = {
        "workload": training.workload.name,
        "source": training.workload.source,
        **asdict(training.recipe),
        "seed": training.seed,
        "total_steps": training.total_steps,
        "hooks": [type(hook).__name__ for hook in hooks],
        "parameters": parameter_shapes(training.model),
        **({} if training.samples_an_epoch is None else {"samples_an_epoch": training.samples_an_epoch}),
        **({"cooldown": training.cooldown} if training.cooldown else {}),
    }
    return json.dumps(facts)


def _compare(path: Path, stored: str, ours: str) -> None:
    theirs, mine = json.loads(stored), json.loads(ours)
    odd = next((name for name in {**mine, **theirs} if theirs.get(name) != mine.get(name)), None)
    if odd is not None:
        values = "" if odd == "parameters" else f" ({theirs.get(odd)!r} there, {mine.get(odd)!r} here)"
        raise CheckpointFault(f"{path}: is the checkpoint of another training, whose {odd} differs{values}: {_CURE}")


def _check_plain(state: Any, where: str) -> None:
    """Refuse types that could be written but not loaded."""
    if isinstance(state, dict):
        for key, value in state.items():
            _check_plain(value, f"{where}[{key!r}]")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            _check_plain(value, f"{where}[{index}]")
    elif type(state) not in (Tensor, int, float, bool, str, bytes, type(None)):
        raise TypeError(
            f"{where} is a {type(state).__name__}: give tensors, numbers, strings, None, and lists, tuples and dicts "
            "of them"
        )

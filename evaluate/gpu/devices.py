"""The devices that checks run on, and where the host waits for one."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evaluate.gpu.checks import SECOND, SECOND_DEVICE, CheckSkipped

_SYNC = "called a synchronizing CUDA operation"
_CHECKOUT = Path(__file__).parents[2]
_counts: list[Any] = []
"""The second device's count of waits, while it is used."""


@contextlib.contextmanager
def device_named(name: str) -> Iterator[torch.device]:
    """A device by its name: torch's own, or SECOND, which exists within the context alone."""
    if name != SECOND:
        yield torch.device(name)
        return
    if not SECOND_DEVICE.exists():
        raise CheckSkipped("needs a GPU")
    module: Any = importlib.import_module("tests.second_device")
    if not module.AVAILABLE:
        raise CheckSkipped(f"needs a GPU: PyTorch {torch.__version__} takes no device that is written in Python")
    with module.second_device() as counts:
        _counts.append(counts)
        try:
            yield torch.device(module.NAME, 0)
        finally:
            _counts.remove(counts)


def counts_waits(device: torch.device) -> bool:
    """Whether `waits` sees anything on this device."""
    return device.type == "cuda" or bool(_counts)


@contextlib.contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Within it, the host's waits for the device are noted; afterwards the list has the place of each."""
    places: list[str] = []
    if device.type != "cuda":
        before = dict(_counts[-1]) if _counts else {}
        yield places
        for key, count in (_counts[-1] if _counts else {}).items():
            places += [key[0]] * (count - before.get(key, 0))
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    places += [_place(warning) for warning in noted if _SYNC in str(warning.message)]


def _place(warning: warnings.WarningMessage) -> str:
    path = Path(warning.filename)
    shown = path.relative_to(_CHECKOUT) if path.is_relative_to(_CHECKOUT) else path.name
    return f"{shown}:{warning.lineno}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

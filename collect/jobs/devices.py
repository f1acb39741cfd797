"""What a job leaves behind on its device: work that has not been waited for, memory, and a context that is broken."""

import gc
import sys
import traceback
from collections.abc import Iterator
from typing import Any

_BUSY = ("busy or unavailable", "all CUDA-capable devices are busy")
"""Of CUDA's message where another process has a GPU for itself alone."""


def settle() -> None:
    """Wait for what a job started. Raises what has gone wrong on the device meanwhile."""
    for module in _in_use():
        module.synchronize()


def clean_up() -> bool:
    """Give back what a job held, so that the next one starts as the first did.

    Returns:
        False where the device refuses: after an illegal access, a failed assertion or a fault of its memory, all that
        the process asks of it fails.
    """
    gc.collect()
    try:
        for module in _in_use():
            module.synchronize()
            module.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def is_crowded(error: BaseException) -> bool:
    """Whether a job failed because others use the device too, or may."""
    torch = sys.modules.get("torch")
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _BUSY)
    )


def _in_use() -> Iterator[Any]:
    """The modules of torch for the devices that this process has used."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            yield module
    if torch.backends.mps.is_available():
        yield torch.mps

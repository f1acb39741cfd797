"""Where a training runs: the device, mixed precision, and the clock."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" is a CUDA GPU, else Apple's, else the CPU.

    Raises:
        UsageError: An unknown name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if _has("cuda") else "mps" if _has("mps") else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r}: choose auto, cpu, cuda, cuda:1, ... or mps") from None
    if device.type not in ("cpu", "cuda", "mps") or not _has(device.type):
        raise UsageError(f"device={name!r}: torch cannot use one here; choose auto or cpu")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work. A CPU never has any left."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def deterministic_environment() -> dict[str, str]:
    """What a process has to find in its environment, before CUDA starts, for cuBLAS to give the same each time."""
    return {_CUBLAS: os.environ.get(_CUBLAS) or ":4096:8"}


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[list[str]]:
    """A context in which a GPU gives the same numbers each time, where PyTorch can. A CPU does so anyway.

    The process needs `deterministic_environment`. Yields a list, into which messages about operators come that give
    other numbers each time and have no other form.
    """
    without: list[str] = []
    if device.type != "cuda":
        yield without
        return
    cudnn, show = torch.backends.cudnn, warnings.showwarning
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = cudnn.deterministic, cudnn.benchmark

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "deterministic" in str(message):
            without.append(str(message).split(". ")[0])
        show(message, *args, **kwargs)

    warnings.showwarning = note
    # To raise would leave a whole workload without outcomes for the sake of the last digits.
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield without
    finally:
        cudnn.deterministic, cudnn.benchmark = kernels
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        warnings.showwarning = show


class Precision:
    """Mixed precision on CUDA: bfloat16 where the GPU computes in it, else float16 with a scaled loss."""

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self.device = device
        self.dtype = self._choose() if wanted and device.type == "cuda" else torch.float32
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)
        if self.scaler.is_enabled():
            # The scaler skips a first step whose gradients overflow, and the schedule does not.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for a forward pass and its loss."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> None:
        """Clip the gradients and take the optimizer's step. Afterwards `.grad` is unscaled."""
        self.scaler.unscale_(optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)  # of those that have a gradient: frozen ones have none
        self.scaler.step(optimizer)
        self.scaler.update()

    def _choose(self) -> torch.dtype:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16


class Clock:
    """Wall-clock and CPU seconds of the spans in which it runs. The CPU's are those of this process, all threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = [0.0, 0.0]
        self._since: tuple[float, float] | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds of wall-clock time so far. A running clock does not wait for the GPU; a stop does."""
        return self._read(0, time.perf_counter)

    @property
    def cpu_seconds(self) -> float:
        """Seconds of CPU time so far."""
        return self._read(1, time.process_time)

    def start(self) -> None:
        """Start a span when the device is idle."""
        synchronize(self._device)
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """End the span when the device has finished its work."""
        synchronize(self._device)
        self._seconds = [self.wall_seconds, self.cpu_seconds]
        self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        ran = self._since is not None
        if ran:
            self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()

    def state_dict(self) -> dict[str, list[float]]:
        """The seconds so far."""
        return {"seconds": [self.wall_seconds, self.cpu_seconds]}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore the seconds. The clock does not run afterwards."""
        self._seconds, self._since = list(state["seconds"]), None

    def _read(self, index: int, now: Callable[[], float]) -> float:
        running = 0.0 if self._since is None else now() - self._since[index]
        return self._seconds[index] + running


def _has(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or torch.backends.mps.is_available()

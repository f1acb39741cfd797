"""What the predictor looks at: the last W snapshots of one layer, and what is known about the training then."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from predictor.errors import UsageError

SIGNALS = ("progress", "depth", "log_lr")
_LOWEST_LOG_LR = -10.0


def depth_of(layers: int) -> Tensor:
    """depth_L of so many layers: 0 for the first, 1 for the last before the head."""
    return (torch.arange(layers, dtype=torch.float64) / max(layers - 1, 1)).float()


def log_lr(lr: float, peak: float) -> float:
    """The signal log_lr of one snapshot, `peak` being the highest learning rate so far."""
    return max(math.log(max(lr / max(peak, 1e-30), 1e-30)), _LOWEST_LOG_LR)


def signals_from(progress_T: Tensor, depth_L: Tensor, log_lr_T: Tensor) -> Tensor:
    """signals_TLS, in the order of SIGNALS, of snapshots and layers whose signals are known one by one."""
    shape = (len(progress_T), len(depth_L))
    columns = (progress_T[:, None].expand(shape), depth_L[None].expand(shape), log_lr_T[:, None].expand(shape))
    return torch.stack(columns, dim=-1)


def signals_of(step_T: Tensor, lr_T: Tensor, total_steps: int, layers: int) -> Tensor:
    """The cheap signals of every layer at every snapshot: signals_TLS, in the order of SIGNALS.

    progress: the share of the training that is done, 0 to 1. depth: the layer's place, 0 for the first and 1 for the
    last before the head. log_lr: logarithm of the learning rate over the highest so far, at least -10.
    """
    progress_T = step_T.double() / total_steps
    peak_T = torch.cummax(lr_T.double(), dim=0).values
    log_lr_T = (lr_T.double() / peak_T.clamp_min(1e-30)).clamp_min(1e-30).log().clamp_min(_LOWEST_LOG_LR)
    return signals_from(progress_T.float(), depth_of(layers), log_lr_T.float())


@dataclass(frozen=True)
class RunWindows:
    """One run's snapshots, signals and labels; windows are cut from them when they are asked for."""

    run_id: str
    family: str
    """The architecture's family, such as "resnet"."""
    source: str
    """What the network was trained on."""
    weights_TLK: Tensor
    signals_TLS: Tensor
    labels_TL: Tensor
    """bool: this layer may be frozen from this snapshot on."""


@dataclass(frozen=True)
class WindowSet:
    """Every window of some runs, cut on demand: kept as copies they would take `window` times the memory."""

    runs: tuple[RunWindows, ...]
    window: int
    """Snapshots in a window (W)."""

    @cached_property
    def index(self) -> Tensor:
        """One row a window: the run's place, that of the window's newest snapshot, and the layer. int64, (N, 3)."""
        parts = [
            torch.cartesian_prod(torch.tensor([place]), torch.arange(self.window - 1, snapshots), torch.arange(layers))
            for place, run in enumerate(self.runs)
            for snapshots, layers in [run.labels_TL.shape]
            if snapshots >= self.window
        ]
        if not parts:
            raise UsageError(f"no run has the {self.window} snapshots of a window: gather longer runs, or ask for less")
        return torch.cat(parts)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, places_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows by their places in `index`: windows_BWK, signals_BWS, labels_B (bool)."""
        windows, signals, labels = [], [], []
        for run, newest, layer in self.index[places_B].tolist():
            source, rows = self.runs[run], slice(newest - self.window + 1, newest + 1)
            windows.append(source.weights_TLK[rows, layer])
            signals.append(source.signals_TLS[rows, layer])
            labels.append(source.labels_TL[newest, layer])
        return torch.stack(windows), torch.stack(signals), torch.stack(labels)

    def subset(self, places: Sequence[int]) -> "WindowSet":
        """The windows of the runs at these places."""
        return replace(self, runs=tuple(self.runs[place] for place in places))

    @cached_property
    def labels_N(self) -> Tensor:
        """Each window's label, bool."""
        # The index goes through a run's windows by snapshot, then by layer, and passes over runs that have none.
        return torch.cat([run.labels_TL[self.window - 1 :].flatten() for run in self.runs])

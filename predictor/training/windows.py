"""What the predictor looks at: the last W snapshots of one layer, and what is known about the training then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from predictor.errors import UsageError


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
    """As `predictor.model.features` describes them."""
    labels_TL: Tensor
    """bool: this layer may be frozen from this snapshot on."""
    harm_TL: Tensor | None = None
    """Percentage points of accuracy that freezing the front up to this layer from this snapshot to the end costs, where
    that has been measured; labels_TL then says where it is little."""
    flops_F: Tensor | None = None
    """FLOPs of a step with a front of 0, 1, ... L layers frozen, as a share of a full one's; with harm_TL."""


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

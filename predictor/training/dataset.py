"""What a predictor is trained on: recorded runs, the windows in them, and the tokens of the windows."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from predictor.errors import UsageError
from predictor.model.config import FEATURES, PredictorConfig
from predictor.model.features import tokens
from predictor.model.history import LayerHistory
from predictor.model.sampling import thinned

# More windows than this say nothing more about the mean and deviation of tokens.
_SAMPLE_WINDOWS = 8192
# Weights in the windows that are in memory at once: a file of a megabyte can declare windows of ten gigabytes.
_MOST_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Recording:
    """What is recorded of a run: T snapshots of L layers, the first at step 0."""

    step_T: Tensor
    lr_T: Tensor
    weights_TLK: Tensor
    gradient_norm_TL: Tensor
    """NaN for a layer without a gradient."""
    size_L: Tensor
    """How many weights each layer holds."""
    total_steps: int


@dataclass(frozen=True)
class Replayed:
    """What a `LayerHistory` made of a recording."""

    kept: list[int]
    """Rows of the snapshots that were not left out."""
    features_TLF: Tensor
    """The features of those."""
    length_T: Tensor
    """Of each of those, the snapshots up to it since the window last began: a window must not be longer."""


def replay(
    recording: Recording, fade_frozen: bool = False, frozen: Sequence[Collection[int]] | None = None
) -> Replayed:
    """Give the snapshots of a recording to a `LayerHistory`, as the policy does while it trains.

    Args:
        recording: the run.
        fade_frozen: as in `LayerHistory`.
        frozen: the frozen layers at each snapshot. By default those that stand still and have no gradient.
    """
    with_gradients = bool(recording.gradient_norm_TL.isfinite().any())
    history = LayerHistory(recording.size_L, recording.total_steps, 3, fade_frozen, needs_gradients=with_gradients)
    frozen = _standing_still(recording) if frozen is None else frozen
    kept, features, lengths = [], [], []
    for row, (step, lr) in enumerate(zip(recording.step_T.tolist(), recording.lr_T.tolist(), strict=True)):
        if history.update(step, lr, recording.weights_TLK[row], recording.gradient_norm_TL[row], frozen[row]):
            kept.append(row)
            features.append(history.features_LF)
            lengths.append(history.length)
    return Replayed(kept, torch.stack(features), torch.tensor(lengths))


@dataclass(frozen=True)
class RunWindows:
    """One run's snapshots, features and labels. Windows are cut from them when they are needed."""

    run_id: str
    family: str
    """The architecture's family, such as "resnet"."""
    source: str
    """What the network was trained on."""
    weights_TLK: Tensor
    features_TLF: Tensor
    """In the order of `predictor.model.config.FEATURES`."""
    labels_TL: Tensor
    """bool: this layer may be frozen from this snapshot on."""
    length_T: Tensor | None = None
    """The longest window that ends at each snapshot, in snapshots: see `Replayed`. By default all before it."""
    cost_TL: Tensor | None = None
    """Percentage points of accuracy that freezing the prefix up to this layer from this snapshot to the end costs, if
    that has been measured. labels_TL then says where it is little."""
    flops_F: Tensor | None = None
    """With cost_TL: FLOPs of a step with a frozen prefix of 0, 1, ... L layers, as a share of a full step's."""

    def newest(self, window: int) -> Tensor:
        """The snapshots at which a window of so many snapshots ends."""
        if self.length_T is None:
            return torch.arange(len(self.labels_TL))[window - 1 :]
        return (self.length_T >= window).nonzero().flatten()


@dataclass(frozen=True)
class WindowSet:
    """Every window of some runs. They are cut when needed: as copies they would take `window` times the memory.

    The order of the windows is that of the runs, in a run that of the snapshots, and at a snapshot that of the layers.
    """

    runs: tuple[RunWindows, ...]
    window: int
    """Snapshots in a window (W)."""

    @cached_property
    def index(self) -> Tensor:
        """One row a window: index of its run, of its newest snapshot, and of its layer. int64, (N, 3)."""
        parts = [
            torch.cartesian_prod(torch.tensor([index]), newest_T, torch.arange(run.labels_TL.shape[1]))
            for index, (run, newest_T) in enumerate(self._newest)
            if len(newest_T)
        ]
        if not parts:
            raise UsageError(f"no run has the {self.window} snapshots of a window: gather longer runs, or ask for less")
        return torch.cat(parts)

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows by their rows in `index`: weights_BWK, features_BWF, labels_B (bool)."""
        weights, features, labels = [], [], []
        for run, newest, layer in self.index[indices_B].tolist():
            source, rows = self.runs[run], slice(newest - self.window + 1, newest + 1)
            weights.append(source.weights_TLK[rows, layer])
            features.append(source.features_TLF[rows, layer])
            labels.append(source.labels_TL[newest, layer])
        return torch.stack(weights), torch.stack(features), torch.stack(labels)

    def subset(self, indices: Sequence[int]) -> "WindowSet":
        """The windows of the runs with these indices."""
        return replace(self, runs=tuple(self.runs[index] for index in indices))

    @cached_property
    def labels_N(self) -> Tensor:
        """Each window's label, bool."""
        return torch.cat([run.labels_TL[newest_T].flatten() for run, newest_T in self._newest])

    def features_NF(self, *names: str) -> Tensor:
        """The features of these names at each window's newest snapshot, one column each."""
        columns = [FEATURES.index(name) for name in names]
        parts = [run.features_TLF[newest_T][..., columns].flatten(0, 1) for run, newest_T in self._newest]
        return torch.cat(parts)

    @property
    def _newest(self) -> list[tuple[RunWindows, Tensor]]:
        return [(run, run.newest(self.window)) for run in self.runs]


class Tokens:
    """The tokens of a set's windows, in the order of its index.

    Tokens of motion take a sixtieth of the memory of their windows, and are kept. Raw tokens are the windows
    themselves. They are cut when needed.
    """

    def __init__(self, windows: WindowSet, config: PredictorConfig, device: str = "cpu") -> None:
        self.windows = windows
        self.config = config
        self.device = device
        self.labels_N = windows.labels_N.to(device)
        self._kept_NTD = kept_tokens(windows, config).to(device) if config.inputs != "raw" else None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, indices_B: Tensor) -> Tensor:
        """tokens_BTD of the windows with these indices."""
        if self._kept_NTD is not None:
            return self._kept_NTD[indices_B.to(self.device)]
        weights_BWK, features_BWF, _ = self.windows.batch(indices_B)
        return tokens(self.config, weights_BWK, features_BWF).to(self.device)

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """All tokens, in order, in pieces."""
        for indices_B in torch.split(torch.arange(len(self)), size):
            yield self[indices_B]

    def sample(self, generator: torch.Generator) -> Tensor:
        """The tokens of some random windows, or of all if there are few: enough for their mean and deviation."""
        return self[torch.randperm(len(self), generator=generator)[:_SAMPLE_WINDOWS]]


def kept_tokens(windows: WindowSet, config: PredictorConfig) -> Tensor:
    """The tokens of every window, for a predictor that does not take raw weights: tokens_NTD.

    At most about _MOST_WEIGHTS weights of windows are in memory at a time, however many a run has.
    """
    config = replace(config, window=windows.window)
    pieces = (piece for run in windows.runs for piece in _pieces(run, windows.window, config.weights))
    return torch.cat([tokens(config, *piece) for piece in pieces])


def _pieces(run: RunWindows, window: int, weights: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of a run, in pieces, in the order of WindowSet.index."""
    newest_T = run.newest(window)
    if not len(newest_T):
        return iter(())
    both = (thinned(run.weights_TLK, weights), run.features_TLF)
    # Views: contiguous snapshots unfold and flatten without a copy.
    unfolded = [part.contiguous().unfold(0, window, 1) for part in both]
    if len(newest_T) < len(unfolded[0]):
        unfolded = [part[newest_T - (window - 1)] for part in unfolded]
    views = (part.flatten(0, 1).transpose(1, 2) for part in unfolded)
    size = max(1, _MOST_WEIGHTS // (window * weights))
    return zip(*(torch.split(view_NWX, size) for view_NWX in views), strict=True)


def _standing_still(recording: Recording) -> list[list[int]]:
    """At each snapshot, the layers without a gradient whose weights are those of the snapshot before."""
    weights_TLK = recording.weights_TLK
    still_TL = torch.zeros(weights_TLK.shape[:2], dtype=torch.bool)
    still_TL[1:] = (weights_TLK[1:] == weights_TLK[:-1]).all(dim=2) & recording.gradient_norm_TL[1:].isnan()
    return [still_L.nonzero().flatten().tolist() for still_L in still_TL]

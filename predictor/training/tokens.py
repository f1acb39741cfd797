"""All windows of a set as tokens for the predictor: motion is computed once, raw weights are cut when asked for."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from predictor.model.network import FreezePredictor, PredictorConfig
from predictor.model.sampling import thinned
from predictor.training.windows import RunWindows, WindowSet

# Tokens of more windows than this say nothing more about their mean and deviation.
_SAMPLE_WINDOWS = 8192
# Weights in the windows that stand in memory at once: a file of a megabyte can declare windows of ten gigabytes.
_MOST_WEIGHTS = 1 << 24
_QUARTILES_TO_DEVIATION = 1.349  # between the quartiles of a normal distribution lie so many deviations


class Tokens:
    """The tokens of a set's windows, in the order of its index.

    Motion tokens are some 60 times smaller than the windows that they come from and are kept; raw tokens are the
    windows, so that keeping them would take `window` times the memory of the runs.
    """

    def __init__(self, windows: WindowSet, config: PredictorConfig, device: str = "cpu") -> None:
        self.windows = windows
        self.device = device
        self.labels_N = windows.labels_N.to(device)
        self._maker = _maker(config)
        self._kept_NTF = kept_tokens(windows, config).to(device) if config.inputs != "raw" else None

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, places_B: Tensor) -> Tensor:
        """tokens_BTF of the windows at these places."""
        if self._kept_NTF is not None:
            return self._kept_NTF[places_B.to(self.device)]
        windows_BWK, signals_BWS, _ = self.windows.batch(places_B)
        return self._maker.tokens(windows_BWK, signals_BWS).to(self.device)

    def chunks(self, size: int = 4096) -> Iterator[Tensor]:
        """All tokens, in order, in pieces."""
        for places_B in torch.split(torch.arange(len(self)), size):
            yield self[places_B]

    def sample(self, generator: torch.Generator) -> Tensor:
        """Tokens of some random windows, or of all where there are few: enough for their mean and deviation."""
        return self[torch.randperm(len(self), generator=generator)[:_SAMPLE_WINDOWS]]


def kept_tokens(windows: WindowSet, config: PredictorConfig) -> Tensor:
    """The tokens of every window, of a predictor that does not look at raw weights: tokens_NTF.

    The windows themselves take memory for some _MOST_WEIGHTS weights at a time, however many a run has.
    """
    maker = _maker(replace(config, window=windows.window))
    long_enough = (run for run in windows.runs if len(run.labels_TL) >= windows.window)
    pieces = (piece for run in long_enough for piece in _pieces(run, windows.window, config.weights))
    return torch.cat([maker.tokens(*piece) for piece in pieces])


@torch.no_grad()
def fit_scaling(model: FreezePredictor, tokens_NTF: Tensor, scaling: str) -> None:
    """Set how the model scales its inputs: "standard", "robust" (median and quartiles) or "none"."""
    if scaling == "standard":
        model.fit_scaling(tokens_NTF)
    if scaling == "robust":
        # One scale for all raw weights: a position has no meaning across layers.
        flat = tokens_NTF.reshape(-1, 1 if model.config.inputs == "raw" else tokens_NTF.shape[-1])
        low_F, middle_F, high_F = (flat.sort(dim=0).values[int(part * (len(flat) - 1))] for part in (0.25, 0.5, 0.75))
        model.mean.copy_(middle_F.expand_as(model.mean))
        model.deviation.copy_(((high_F - low_F) / _QUARTILES_TO_DEVIATION).expand_as(model.deviation))


def _maker(config: PredictorConfig) -> FreezePredictor:
    """A model that makes tokens, for which it needs no parameters: on this device it has none, and draws none."""
    with torch.device("meta"):
        return FreezePredictor(config)


def _pieces(run: RunWindows, window: int, weights: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of a run, in pieces, in the order of WindowSet.index: by snapshot, then by layer."""
    both = (thinned(run.weights_TLK, weights), run.signals_TLS)
    # Views: contiguous snapshots unfold and flatten without a copy.
    views = (part.contiguous().unfold(0, window, 1).flatten(0, 1).transpose(1, 2) for part in both)
    size = max(1, _MOST_WEIGHTS // (window * weights))
    return zip(*(torch.split(view_NWX, size) for view_NWX in views), strict=True)

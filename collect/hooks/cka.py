"""A hook that compares each layer's output with that of the final network, by unbiased CKA."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from collect.hooks.recorder import Recorded
from collect.training.loop import Hook
from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.model.sampling import SampleSpec
from predictor.policies.measuring.similarity import by_sample, cka_to_last, gram, upper_triangle


@dataclass(frozen=True)
class ProbeSpec:
    """The inputs and outputs that CKA compares."""

    samples: int = 80
    """Test inputs for every snapshot (n). More would cost over 3 % of a short training's time."""
    features: int = 2048
    """Numbers of each layer's output for an input, at positions that are drawn once."""

    def __post_init__(self) -> None:
        if self.samples < 4 or self.features < 1:
            raise UsageError(f"{self}: unbiased CKA needs at least 4 samples, and 1 feature")


class Probed(Recorded, Protocol):
    """What a `CKARecorder` needs of a training besides: the toolkit's own is one, see `Training` for each."""

    @property
    def model(self) -> nn.Module: ...  # noqa: D102
    @property
    def source(self) -> Any: ...  # noqa: D102
    @property
    def precision(self) -> Any: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    def untimed(self) -> AbstractContextManager[None]: ...  # noqa: D102


def _call(model: nn.Module, inputs: Any) -> object:
    return model(inputs)


class CKARecorder(Hook):
    """Compares each snapshot's layers with those of the final network, without keeping a network.

    At each snapshot the network runs on the same n test inputs, in evaluation mode. X is the output of `layer.output`
    at its first call (the first tensor of a tuple or dict), with centred columns, at most `probe.features` of them. The
    Gram matrix K = XX' is kept: the n (n - 1) / 2 numbers above its diagonal in float32, 32 kB a layer a snapshot at
    n = 128. They stay on the device, so that no snapshot waits for a GPU. HSIC1 needs no more: it zeroes the diagonals,
    and no shift of X changes it. At the end, in float64 (Nguyen, Raghu and Kornblith, ICLR 2021; Song et al., JMLR
    2012):

        HSIC1(K, L) = [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))
        CKA = HSIC1(K, L) / sqrt(HSIC1(K, K) HSIC1(L, L)),  L that of the final network

    The probe leaves the model, its statistics and the random generators as they were. Its time is no training time. It
    costs a forward pass of n samples a snapshot, 61 of them by default.

    Args:
        spec: When snapshots are taken; the same as the `Recorder`'s.
        probe: The inputs and outputs to compare.
        call: How the model is called on the inputs.
    """

    def __init__(
        self,
        spec: SampleSpec,
        probe: ProbeSpec = ProbeSpec(),
        call: Callable[[nn.Module, Any], object] = _call,
    ) -> None:
        self.spec = spec
        self.probe = probe
        self._call = call
        self.similarity_TL: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        """After the end: unbiased CKA of each snapshot's layers with the final ones, at most 1. NaN in a run that
        diverged, for a layer that the model does not call, and for outputs that are the same for all inputs."""

    def on_start(self, training: Probed) -> None:
        """Choose the inputs, and probe the network at step 0."""
        with training.untimed():
            self._inputs = training.source.probe(self.probe.samples, device=training.device)
            if len(self._inputs) < 4:
                raise UsageError(
                    f"{training.source.name} has {len(self._inputs)} test samples: unbiased CKA needs at least 4"
                )
            self._device = training.device
            self._positions: dict[int, Tensor] = {}
            self._triangles = [self._probe(training)]

    def on_step(self, training: Probed) -> None:
        """Probe the network, if a snapshot is due."""
        if self.spec.due(training.step, training.total_steps):
            with training.untimed():
                self._triangles.append(self._probe(training))

    def on_end(self, training: Probed) -> None:
        """Compare all snapshots with the last."""
        triangles_TLP = torch.stack(self._triangles).cpu()
        self.similarity_TL = np.full(triangles_TLP.shape[:2], math.nan, dtype=np.float32)
        if training.status == "finished":
            for layer in range(triangles_TLP.shape[1]):
                self.similarity_TL[:, layer] = cka_to_last(triangles_TLP[:, layer], len(self._inputs)).numpy()
        self._triangles.clear()

    def state_dict(self) -> dict[str, Any]:
        """The Gram matrices so far. Positions are drawn again."""
        return {"triangles": self._triangles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of the same training."""
        self._triangles = [triangle_LP.to(self._device) for triangle_LP in state["triangles"]]

    def _probe(self, training: Probed) -> Tensor:
        """triangle_LP of the current network."""
        layers, samples = training.layers, len(self._inputs)
        triangle_LP = torch.zeros(len(layers), samples * (samples - 1) // 2, device=self._device)
        seen: set[int] = set()

        def take(layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
            if layer not in seen:
                seen.add(layer)
                triangle_LP[layer] = self._triangle(layer, output)

        with isolated(training.model), training.precision.forward(), ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.callback(layer.output.register_forward_hook(partial(take, index)).remove)
            self._call(training.model, self._inputs)
        return triangle_LP

    def _triangle(self, layer: int, output: Any) -> Tensor:
        """What is kept of one layer's output; zeros for an output without a row a sample."""
        samples = len(self._inputs)
        features_BF = by_sample(output, samples)
        if features_BF is None:
            return torch.zeros(samples * (samples - 1) // 2, device=self._device)
        with torch.autocast(features_BF.device.type, enabled=False):  # products in full precision
            return upper_triangle(gram(self._chosen(layer, features_BF)))

    def _chosen(self, layer: int, features_BF: Tensor) -> Tensor:
        size = features_BF.shape[1]
        if size <= self.probe.features:
            return features_BF.float()
        if layer not in self._positions:
            generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + layer)
            positions = torch.randperm(size, generator=generator)[: self.probe.features].sort().values
            self._positions[layer] = positions.to(features_BF.device)
        return features_BF.index_select(1, self._positions[layer]).float()

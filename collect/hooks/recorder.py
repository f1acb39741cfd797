"""A hook that records how the layers move: their sampled weights and what goes with them, snapshot by snapshot."""

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from collect.training.loop import Hook
from predictor.layers.layer import Layer
from predictor.model.sampling import LayerSampler, SampleSpec
from predictor.policies.measuring.gradients import gradient_norms


class Recorded(Protocol):
    """What a `Recorder` reads of a training: the toolkit's own is one, see `Training` for each."""

    step: int
    total_steps: int
    loss: Tensor

    @property
    def layers(self) -> tuple[Layer, ...]: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def lr(self) -> float: ...  # noqa: D102
    @property
    def train_seconds(self) -> float: ...  # noqa: D102


class Recorder(Hook):
    """Takes a snapshot before the first step and after every step for which `spec.due`.

    weights: K of each layer, at positions drawn once.
    loss: the mean over the steps since the snapshot before.
    gradient norm: of all gradients of the layer, as the optimizer saw them; NaN where the layer has none.

    Everything stays on the device until the end, so that no snapshot waits for a GPU. Between snapshots a step costs
    one addition.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.spec = spec

    def on_start(self, training: Recorded) -> None:
        """Draw the positions, and take the snapshot at step 0."""
        self._layers = training.layers
        self._sampler = LayerSampler(self._layers, self.spec)
        rows, layers = self.spec.taken(training.total_steps, training.total_steps) + 1, len(self._layers)
        self._tensors = {
            "weights_TLK": torch.empty(rows, layers, self.spec.weights, device=training.device),
            "loss_T": torch.full((rows,), math.nan, device=training.device),
            "gradient_norm_TL": torch.full((rows, layers), math.nan, device=training.device),
            "loss_sum": torch.zeros((), device=training.device),
        }
        self._losses = 0
        self._step: list[int] = []
        self._lr: list[float] = []
        self._seconds: list[float] = []
        self._add_row(training)

    @torch.no_grad()
    def on_step(self, training: Recorded) -> None:
        """Add up the loss, and take a snapshot when one is due."""
        self._tensors["loss_sum"] += training.loss
        self._losses += 1
        if self.spec.due(training.step, training.total_steps):
            self._take(training)

    def fields(self) -> dict[str, Any]:
        """What `data.trajectories.Trajectory` keeps of the recording, by its names."""
        taken = len(self._step)
        arrays = {name: tensor[:taken].cpu().numpy() for name, tensor in self._tensors.items() if name != "loss_sum"}
        return {
            "layer_names": tuple(layer.name for layer in self._layers),
            "layer_sizes_L": np.array([layer.size for layer in self._layers], dtype=np.int64),
            "step_T": np.array(self._step, dtype=np.int64),
            "lr_T": np.array(self._lr, dtype=np.float64),
            "seconds_T": np.array(self._seconds, dtype=np.float64),
            **arrays,
        }

    def state_dict(self) -> dict[str, Any]:
        """All rows so far, and the sums under way."""
        rows = {"step": self._step, "lr": self._lr, "seconds": self._seconds}
        return {**rows, "losses": self._losses, "tensors": self._tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same training."""
        self._step, self._lr, self._seconds = (list(state[name]) for name in ("step", "lr", "seconds"))
        self._losses = state["losses"]
        self._tensors = {name: state["tensors"][name].to(own.device) for name, own in self._tensors.items()}

    def _take(self, training: Recorded) -> None:
        row = len(self._step)
        self._tensors["loss_T"][row] = self._tensors["loss_sum"] / self._losses
        self._tensors["loss_sum"].zero_()
        self._losses = 0
        self._tensors["gradient_norm_TL"][row] = gradient_norms(self._layers)
        self._add_row(training)

    def _add_row(self, training: Recorded) -> None:
        self._tensors["weights_TLK"][len(self._step)] = self._sampler.sample_all()
        self._step.append(training.step)
        self._lr.append(training.lr)
        self._seconds.append(training.train_seconds)

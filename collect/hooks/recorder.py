"""A hook that records how the layers move: sampled weights, gradient norms and losses, snapshot by snapshot."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collect.training.loop import Hook, Training
from predictor.model.sampling import LayerSampler, SampleSpec
from predictor.policies.measuring.gradients import gradient_norms


class Recorder(Hook):
    """Takes a snapshot before the first step and after every step for which `spec.due`.

    weights: K of each layer, at positions drawn once.
    loss: the mean over the steps since the snapshot before.
    gradient norm: of all gradients of the layer, as the optimizer saw them; NaN where the layer has none.
    update norm: of the last optimizer step alone, estimated from the sampled weights w as
        sqrt(size / K) * ||w_after - w_before||, size being the layer's. That takes a sample before the step, too: one
        more for each snapshot, where snapshots do not follow step upon step.

    Everything stays on the device until the end, so that no snapshot waits for a GPU. Between snapshots a step costs
    one addition.

    Args:
        spec: The weights to sample, and when.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.spec = spec

    def on_start(self, training: Training) -> None:
        """Draw the positions, and take the snapshot of step 0."""
        self._layers = training.layers
        self._sampler = LayerSampler(self._layers, self.spec)
        rows, layers = self.spec.taken(training.total_steps, training.total_steps) + 1, len(self._layers)
        sizes_L = torch.tensor([float(layer.size) for layer in self._layers], device=training.device)
        self._scale_L = (sizes_L / self.spec.weights).sqrt()
        self._tensors = {
            "weights_TLK": torch.empty(rows, layers, self.spec.weights, device=training.device),
            "loss_T": torch.full((rows,), math.nan, device=training.device),
            "gradient_norm_TL": torch.full((rows, layers), math.nan, device=training.device),
            "update_norm_TL": torch.full((rows, layers), math.nan, device=training.device),
            "loss_sum": torch.zeros((), device=training.device),
        }
        self._losses = 0
        self._step: list[int] = []
        self._lr: list[float] = []
        self._seconds: list[float] = []
        self._before_LK = self._sampler.sample_all()
        self._add_row(training, self._before_LK)

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        """Add up the loss, and take a snapshot or the sample before one, if it is due."""
        self._tensors["loss_sum"] += training.loss
        self._losses += 1
        due = self.spec.due(training.step, training.total_steps)
        due_next = self.spec.due(training.step + 1, training.total_steps)
        if not (due or due_next):
            return
        weights_LK = self._sampler.sample_all()
        if due:
            self._take(training, weights_LK)
        self._before_LK = weights_LK

    def fields(self) -> dict[str, Any]:
        """The recording as fields of `data.trajectories.Trajectory`."""
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
        """All rows so far, and the sums since the last one."""
        rows = {"step": self._step, "lr": self._lr, "seconds": self._seconds}
        return {**rows, "losses": self._losses, "before": self._before_LK, "tensors": self._tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of the same training."""
        self._step, self._lr, self._seconds = (list(state[name]) for name in ("step", "lr", "seconds"))
        self._losses = state["losses"]
        device = self._before_LK.device
        self._before_LK = state["before"].to(device)
        self._tensors = {name: tensor.to(device) for name, tensor in state["tensors"].items()}

    def _take(self, training: Training, weights_LK: Tensor) -> None:
        row = len(self._step)
        self._tensors["loss_T"][row] = self._tensors["loss_sum"] / self._losses
        self._tensors["loss_sum"].zero_()
        self._losses = 0
        self._tensors["gradient_norm_TL"][row] = gradient_norms(self._layers)
        change_L = torch.linalg.vector_norm(weights_LK - self._before_LK, dim=1)
        self._tensors["update_norm_TL"][row] = self._scale_L * change_L
        self._add_row(training, weights_LK)

    def _add_row(self, training: Training, weights_LK: Tensor) -> None:
        self._tensors["weights_TLK"][len(self._step)] = weights_LK
        self._step.append(training.step)
        self._lr.append(training.lr)
        self._seconds.append(training.train_seconds)

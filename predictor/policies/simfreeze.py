"""SimFreeze: a layer freezes when its output for the same inputs no longer changes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.model.sampling import SampleSpec
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.activations import Batch, BatchTaker, outputs_of, refuse_sharded
from predictor.policies.measuring.similarity import cka_to_last, gram, upper_triangle


class SimFreezePolicy(FreezePolicy):
    """Freezes each layer whose output for a fixed batch has stayed similar to itself from check to check.

    Paper: SimFreeze, a part of ETuner, by the group that made SmartFRZ.

    Rule: at every check each active layer's self-similarity is measured: the CKA between its outputs for the same
    inputs now and at the check before. A layer freezes when that was at least 1 - `tolerance` at `patience` checks in a
    row.

    Signal: activations.

    Differs: the paper's idea is that layers freeze by the self-similarity of their representations, measured by CKA.
    All details are our reading. The inputs are the first batch that the model trained on, which is kept. CKA is linear
    and unbiased, and measured in evaluation mode. A frozen layer stays frozen. `prefix` keeps the frozen set a prefix,
    where freezing saves most. A layer whose output has no row for each sample, or is the same for all, freezes with the
    one behind it. There is no stage before the first check, which suits pretrained weights: from scratch, small steps
    under a warm-up make all outputs similar.

    Cost: at each check one forward pass of the whole model without gradients; memory for one batch and B (B - 1) / 2
    numbers a layer.

    Args:
        tolerance: how far below 1 the similarity may be.
        patience: checks in a row.
        checks: checks in a whole training, evenly spread.
        prefix: freeze a layer only together with all before it.
    """

    def __init__(self, tolerance: float = 0.005, patience: int = 3, checks: int = 60, prefix: bool = True) -> None:
        if not 0 < tolerance < 1:
            raise UsageError(f"tolerance={tolerance}: give a difference in similarity, between 0 and 1")
        for name, value in (("patience", patience), ("checks", checks)):
            if value < 1:
                raise UsageError(f"{name}={value}: give a number of checks, from 1")
        self.tolerance = tolerance
        self.patience = patience
        self.prefix = prefix
        self._checks = SampleSpec(snapshots=checks)
        self._begin()

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Begin anew, and wait for the first batch. Raises UsageError for a sharded model."""
        refuse_sharded(model, "simfreeze")
        self._begin()
        self._model = model
        self._taker = BatchTaker(model)
        self._taker.wait()

    def _begin(self) -> None:
        self._probe: Batch | None = None
        self._last: dict[int, Tensor] = {}  # triangle_P of each layer that was active at the last check
        self._calm: dict[int, int] = {}  # checks in a row at which a layer was similar to itself
        self.passes: Counter[int] = Counter()
        self._silent: list[int] = []  # layers that had no similarity at the last check

    def observe(self, view: View) -> None:
        """Take the first batch, or check all active layers where that is due."""
        if self._probe is None:
            self._take()
        if self._probe is not None and view.active and self._checks.due(view.step, view.total_steps):
            self._check(view, self._probe)

    def decide(self, view: View) -> frozenset[int]:
        """The layers frozen so far, and those whose outputs have stopped changing."""
        ready = {index for index in view.active if self._calm.get(index, 0) >= self.patience}
        if self.prefix:
            ready = self._prefix_of(ready | view.frozen)
        return view.frozen | ready

    def state_dict(self) -> dict[str, Any]:
        """The kept batch, and each active layer's similarities."""
        return {
            "probe": None if self._probe is None else self._probe.state_dict(),
            "last": {index: triangle_P.cpu() for index, triangle_P in self._last.items()},
            "calm": dict(self._calm),
            "silent": list(self._silent),
            "passes": dict(self.passes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the batch and the similarities."""
        device = next(self._model.parameters()).device
        self._probe = None if state["probe"] is None else Batch.of_state(state["probe"], device)
        self._last = {index: triangle_P.cpu() for index, triangle_P in state["last"].items()}
        self._calm, self._silent = dict(state["calm"]), list(state["silent"])
        self.passes = Counter(state["passes"])
        self._taker.close()
        if self._probe is None:
            self._taker.wait()

    def close(self) -> None:
        """Drop the batch and the hook on the model."""
        self._taker.close()
        self._probe = None
        self._last = {}

    def _take(self) -> None:
        batch = self._taker.taken()
        if batch is None:
            self._taker.wait()
        elif batch.samples < 4:
            raise UsageError(
                f"the first batch has {batch.samples} samples: simfreeze needs at least 4 to compare "
                "them; use larger batches or another policy"
            )
        else:
            self._probe = batch.kept()

    def _check(self, view: View, probe: Batch) -> None:
        """Compare each active layer's output with that at the last check."""
        layers = {index: view.layers[index] for index in view.active}
        now = _on_host(outputs_of(self._model, layers, probe, lambda features_BF: upper_triangle(gram(features_BF))))
        self.passes[max(layers)] += probe.samples
        self._silent = [index for index in view.active if index not in now]
        for index, triangle_P in now.items():
            if index in self._last:
                similarity = cka_to_last(torch.stack([self._last[index], triangle_P]), probe.samples)[0].item()
                self._calm[index] = self._calm.get(index, 0) + 1 if similarity >= 1 - self.tolerance else 0
                if similarity != similarity:
                    self._silent.append(index)
        self._last = now

    def _prefix_of(self, indices: set[int]) -> set[int]:
        """The layers before the first that is neither among `indices` nor silent."""
        end = 0
        while end in indices or end in self._silent:
            end += 1
        # Silent layers at its end wait for the next one that can be measured.
        return set(range(max((index for index in indices if index < end), default=-1) + 1))


def _on_host(triangles: dict[int, Tensor]) -> dict[int, Tensor]:
    """The same on the CPU, in one copy: each copy waits for a GPU."""
    if not triangles:
        return {}
    first, *_ = triangles.values()
    triangles_LP = torch.stack([triangle_P.to(first.device) for triangle_P in triangles.values()]).cpu()
    return dict(zip(triangles, triangles_LP.unbind(), strict=True))

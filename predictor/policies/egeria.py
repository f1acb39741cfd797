"""Egeria: a layer freezes when its output keeps its distance from that of a quantized reference."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.model.sampling import SampleSpec
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.activations import Batch, BatchTaker, outputs_of, refuse_sharded
from predictor.policies.measuring.quantized import QuantizedReference
from predictor.policies.measuring.similarity import preserving_loss


class EgeriaPolicy(FreezePolicy):
    """Freezes the first active layer when its distance from a quantized copy of the model has become steady.

    Paper: Egeria (Wang et al., EuroSys 2023, arXiv 2201.06227).

    Rule: after a bootstrapping stage, at every check, the first active layer's output for the batch just trained on is
    compared with that of an int8 reference by the similarity-preserving loss. A moving average smooths the losses. The
    layer freezes when the slope of the line through the last `window` of them was small at `patience` checks in a row.
    When the learning rate has fallen to a tenth of what it was when the first layer froze, all layers are unfrozen, and
    freeze again with half the window.

    Signal: activations.

    Differs: plasticity against a quantized reference, the two stages and the cached forward pass are the paper's. The
    line, the unfreezing and what ends the first stage follow our memory of it; all else is our reading. A policy does
    not see the loss, so the first stage is a share of the training. The slope is measured free of scale: what the line
    rises or falls over the window, as a share of the largest smoothed loss of any layer so far. In the average the
    newest loss has half the weight. The reference has rounded weights, but computes in floating point and in the
    training's own process. Both passes are made after the step, in evaluation mode. The cache is `FeatureCache`, for
    all policies alike. A layer whose output has no row for each sample freezes with the one behind it. Layers are
    measured one after another, each from its first loss on, so that at most one freezes in `window` + `patience` - 1
    checks: in a deep network let blocks be layers. Under a schedule that ends near zero, all layers are unfrozen
    towards its end.

    Cost: at each check two passes of the frozen prefix and one layer more, without gradients; memory for a quarter of
    the weights.

    Args:
        bootstrap: the share of the training before the first check.
        window: losses that the line is fitted to.
        tolerance: the share of the largest loss by which the line may rise or fall.
        patience: checks in a row.
        refresh: checks after which the reference is made again.
        checks: checks in a whole training, evenly spread.
    """

    unfreezes = True

    def __init__(
        self,
        bootstrap: float = 0.1,
        window: int = 4,
        tolerance: float = 0.2,
        patience: int = 2,
        refresh: int = 5,
        checks: int = 60,
    ) -> None:
        if not 0 <= bootstrap < 1:
            raise UsageError(f"bootstrap={bootstrap}: give a share of the training, from 0 to below 1")
        if tolerance <= 0:
            raise UsageError(f"tolerance={tolerance}: give a share above 0")
        if window < 2:
            raise UsageError(f"window={window}: a line needs at least 2 checks")
        for name, value in (("patience", patience), ("refresh", refresh), ("checks", checks)):
            if value < 1:
                raise UsageError(f"{name}={value}: give a number of checks, from 1")
        self.bootstrap = bootstrap
        self.tolerance = tolerance
        self.patience = patience
        self.refresh = refresh
        self.window = window
        """Losses that the line is fitted to; half of it once layers have been unfrozen."""
        self._whole_window = window
        self._checks = SampleSpec(snapshots=checks)
        self._begin()

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Keep the model, and begin anew. Raises UsageError for a sharded one."""
        refuse_sharded(model, "egeria")
        self._model = model
        self._optimizer = optimizer
        self._taker = BatchTaker(model)
        self._begin()

    def _begin(self) -> None:
        self.window = self._whole_window
        self._reference: QuantizedReference | None = None
        self._done = 0  # checks, that which made the first reference among them
        self._layer = -1  # the first active layer, which is measured
        self._losses: list[float] = []  # smoothed, of that layer
        self._largest = 0.0  # smoothed loss of any layer so far
        self._calm = 0  # checks in a row at which that layer's line was flat
        self._silent: list[int] = []  # layers without an output to measure: they freeze with the one behind
        self._rate = 0.0  # at the last step
        self._rate_then: float | None = None  # when the first of the layers frozen now froze
        self.passes: Counter[int] = Counter()

    def observe(self, view: View) -> None:
        """Check the first active layer where that is due, and wait for the next step's batch where it will be."""
        self._follow(view)
        if self._taker.waiting:
            self._check(view)
        self._wait(view)

    def decide(self, view: View) -> frozenset[int]:
        """The frozen prefix, with one layer more when that has become steady; none when all are unfrozen."""
        if view.step == 0:
            self._wait(view)
        if view.frozen and self._has_fallen():
            return frozenset()
        if self._calm < self.patience or self._layer in view.frozen:
            return view.frozen
        return view.frozen | frozenset(range(self._layer + 1))

    def state_dict(self) -> dict[str, Any]:
        """The reference as int8, and what was measured of the first active layer."""
        return {
            "reference": None if self._reference is None else self._reference.state_dict(),
            "done": self._done,
            "front": self._layer,
            "losses": list(self._losses),
            "largest": self._largest,
            "calm": self._calm,
            "silent": list(self._silent),
            "window": self.window,
            "rate": self._rate,
            "rate_then": self._rate_then,
            "waiting": self._taker.waiting,
            "passes": dict(self.passes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the reference and the measurements."""
        reference = state["reference"]
        self._reference = None if reference is None else QuantizedReference.of_state(reference, self._model)
        self._done, self._layer, self._calm = state["done"], state["front"], state["calm"]
        self._losses, self._silent = list(state["losses"]), list(state["silent"])
        self._largest = state["largest"]
        self.window, self._rate, self._rate_then = state["window"], state["rate"], state["rate_then"]
        self.passes = Counter(state["passes"])
        self._taker.close()
        if state["waiting"]:
            self._taker.wait()

    def close(self) -> None:
        """Drop the reference and the hook on the model."""
        self._taker.close()
        self._reference = None

    def _wait(self, view: View) -> None:
        after, total = view.step + 1, view.total_steps
        if self.bootstrap * total <= after <= total and self._checks.due(after, total) and view.active:
            self._taker.wait()

    def _follow(self, view: View) -> None:
        """Note what became of the last answer: of several processes another may have decided."""
        if view.frozen and self._rate_then is None:
            self._rate_then = self._rate
        elif not view.frozen and self._rate_then is not None:
            self._rate_then = None
            self.window = max(2, self._whole_window // 2)
            self._start_over(-1)
        self._rate = float(self._optimizer.param_groups[0]["lr"])

    def _has_fallen(self) -> bool:
        # A rate that is a tenth of another on paper may differ from it in its last digit.
        return self._rate_then is not None and self._rate < 0.1 * self._rate_then * (1 + 1e-6)

    def _check(self, view: View) -> None:
        batch = self._taker.taken()
        if batch is None:
            return
        first = next((index for index in view.active if index not in self._silent), None)
        if self._reference is not None and first is not None and batch.samples > 1:
            self._measure(view.layers[first], first, batch, self._reference)
        if self._done % self.refresh == 0:
            self._reference = QuantizedReference(self._model)
        self._done += 1

    def _measure(self, layer: Layer, index: int, batch: Batch, reference: QuantizedReference) -> None:
        """Compare a layer's output with the reference's."""
        if index != self._layer:
            self._start_over(index)
        now = outputs_of(self._model, {index: layer}, batch)
        then = outputs_of(self._model, {index: layer}, batch, weights=reference.weights())
        self.passes[index] += 2 * batch.samples
        if index in now:
            # Times the samples, since the loss falls with their number and a last batch may be short.
            self._record(float(preserving_loss(now[index], then[index])) * batch.samples)
        else:
            self._silent.append(index)

    def _start_over(self, index: int) -> None:
        self._layer, self._losses, self._calm = index, [], 0

    def _record(self, loss: float) -> None:
        if not isfinite(loss):  # a batch that overflows is no evidence, and would spoil the average for good
            return
        smoothed = (self._losses[-1] + loss) / 2 if self._losses else loss
        self._losses = [*self._losses, smoothed][-self.window :]
        self._largest = max(self._largest, smoothed)
        if len(self._losses) == self.window:
            change = abs(slope(self._losses)) * (self.window - 1)
            self._calm = self._calm + 1 if change <= self.tolerance * self._largest else 0


def slope(values: Sequence[float]) -> float:
    """The slope of the least-squares line through values at 0, 1, 2, ...; at least two.

    sum((x - mean x) y) / sum((x - mean x)^2), where the mean of y falls out.
    """
    middle = (len(values) - 1) / 2
    square = sum((x - middle) ** 2 for x in range(len(values)))
    return sum((x - middle) * value for x, value in enumerate(values)) / square

"""SpFDE's schedule: blocks of layers freeze front to back, from the step on that meets a target for the FLOPs."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import cos, pi
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy, View
from predictor.policies.measuring.layer_rates import OwnRates


class SpFDEPolicy(FreezePolicy):
    """Freezes block after block at even intervals, so that the whole training costs a target share of its FLOPs.

    Paper: Layer Freezing & Data Sieving (Yuan et al., NeurIPS 2022, arXiv 2209.11204).

    Rule: the layers form N blocks. The first freezes at T_frz, then one more every dT, strictly front to back, until
    about two thirds of the layers are frozen. T_frz is solved from the FLOPs that the training may cost. A block that
    will freeze learns at lr_k(t) = a (1 + cos(pi t / T_k)) / 2, which reaches zero where it freezes, at T_k. A frozen
    block stays frozen.

    Signal: time, and what the layers cost.

    Differs: this is the schedule alone. The sparse training and the data sieving of the method combine with any policy,
    as `collect.hooks.sparse_masks` and `collect.hooks.sieve`, or `sparse` and `sieve` in a suite. dT is the masks'
    update interval there, and a share of the training here. The target counts the FLOPs that are executed, of which
    masks save none. Our reading: T_frz is the last step that keeps the target. A block's own rate replaces the
    training's schedule, warm-up included. All other layers, the head, and a block whose time would come after the end
    follow that schedule. Nothing freezes where FLOPs cannot be counted.

    Cost: one forward pass to count, and a copy of those blocks' weights during each optimizer step.

    Args:
        blocks: how many blocks of equally many layers. At most one a layer.
        interval: the time between two blocks, as a share of the training.
        most: the largest share of the layers that may freeze.
        target: the whole training's FLOPs, as a share of those without freezing.

    Raises:
        UsageError: at the first step, when the target cannot be reached even by freezing from there on. Layers that
            freeze at once would keep their first weights.
    """

    wants_flops = True

    def __init__(self, blocks: int = 8, interval: float = 0.05, most: float = 2 / 3, target: float = 0.8) -> None:
        if blocks < 1:
            raise UsageError(f"blocks={blocks}: give a number of blocks, from 1")
        if not 0 <= interval <= 1:
            raise UsageError(f"interval={interval}: give a share of the training, from 0 to 1")
        for name, value in (("most", most), ("target", target)):
            if not 0 < value <= 1:
                raise UsageError(f"{name}={value}: give a share above 0 and at most 1")
        self.blocks = blocks
        self.interval = interval
        self.most = most
        self.target = target
        self._first: int | None = None

    def bind(self, model: nn.Module, optimizer: Optimizer, layers: Sequence[Layer]) -> None:
        """Form the blocks, and read the rate at which each layer starts."""
        self._own = OwnRates(optimizer, layers)
        self._ends = block_ends(len(layers), self.blocks, self.most)

    def rates(self, view: View) -> Mapping[int, float]:
        """The own rate of each layer in a block that will freeze, as a multiple of the scheduled one."""
        freezes_at = self._freezes_at(view)
        ending = [index for index in view.active if freezes_at.get(index, view.total_steps) < view.total_steps]

        def rate(index: int) -> float:
            return 0.5 * self._own.start_L[index] * (1 + cos(pi * min(view.step / freezes_at[index], 1.0)))

        return self._own.factors(ending, rate)

    def decide(self, view: View) -> frozenset[int]:
        """The layers whose block's time has come."""
        return frozenset(index for index, step in self._freezes_at(view).items() if view.step >= step)

    def state_dict(self) -> dict[str, Any]:
        """The rates at which the layers started, and the step at which the first block freezes, where it is known."""
        return {"start": list(self._own.start_L), "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._own.start_L = list(state["start"])
        self._first = state["first"]

    def _freezes_at(self, view: View) -> dict[int, int]:
        """The step at which each layer freezes, by index; empty as long as the FLOPs are not known."""
        if self._first is None and view.flops is not None:
            self._first = first_freeze(view.flops, self._ends, self._delays(view), view.total_steps, self.target)
        if self._first is None:
            return {}
        begins = (0, *self._ends)
        spans = zip(begins, self._ends, self._delays(view), strict=False)
        return {index: self._first + delay for begin, end, delay in spans for index in range(begin, end)}

    def _delays(self, view: View) -> tuple[int, ...]:
        """Steps from the first block's freeze to each one's."""
        return tuple(round(number * self.interval * view.total_steps) for number in range(len(self._ends)))


def block_ends(layers: int, blocks: int, most: float) -> tuple[int, ...]:
    """The end of each block that may freeze, as the index behind its last layer.

    `layers` are cut into `blocks` parts as equal as whole layers allow. Those that end within the first share `most` of
    the layers may freeze.
    """
    parts = min(blocks, layers)
    ends = (round(layers * (number + 1) / parts) for number in range(parts))
    return tuple(end for end in ends if end <= most * layers + 1e-9)


def first_freeze(flops: LayerFlops, ends: Sequence[int], delays: Sequence[int], total_steps: int, target: float) -> int:
    """The last step at which the first block can freeze so that the training costs at most `target` of its full FLOPs.

    Args:
        flops: what the layers cost.
        ends: the end of each block, from `block_ends`.
        delays: steps from the first block's freeze to each one's.
        total_steps: optimizer steps of the whole training.
        target: a share of the full FLOPs.

    Raises:
        UsageError: the target cannot be reached even by freezing the first block after one step.
    """
    costs = [flops.step(frozenset(range(end))) for end in (0, *ends)]
    saved = [before - after for before, after in pairwise(costs)]

    def cost(first: int) -> int:
        spared = sum(each * max(0, total_steps - first - delay) for each, delay in zip(saved, delays, strict=True))
        return total_steps * costs[0] - spared

    budget = target * total_steps * costs[0]
    if cost(1) > budget:
        raise UsageError(
            f"target={target}: with blocks of layers up to {ends[-1] if ends else 0} of {len(flops.forward_L)} frozen "
            f"as early as can be, {cost(1) / (total_steps * costs[0]):.3f} of the FLOPs are left: raise the target, "
            "freeze more layers (most), or freeze them faster (interval)"
        )
    return bisect_right(range(1, total_steps + 1), budget, key=cost)

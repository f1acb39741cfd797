"""InfoBatch in a training: epochs leave out some samples of small loss, and the others of small loss count more."""

from typing import Any

import torch
from torch import Tensor

from collect.training.loop import Hook, Training
from collect.training.state import steps_per_epoch
from data.sources.base import generator_for
from predictor.errors import UsageError

_WHOLE = 0.125
"""The last share of the epochs, which goes through all samples: 1 - delta, with the paper's delta of 0.875."""
_BELOW = 0.7
"""The share of the samples whose loss is below the mean, as it is expected when the steps are planned."""


class InfoBatch(Hook):
    """Leaves out a random share of the samples with a loss below the mean, without a bias of the gradient.

    Paper: InfoBatch (Qin et al., ICLR 2024, arXiv 2303.04947).

    Rule: before each epoch, of the samples whose last loss is below the mean of all last losses, a share r is left out,
    drawn at random. The loss of the others of these is multiplied by 1 / (1 - r). The last 12.5 % of the epochs go
    through all samples, each with a weight of 1.

    Differs: how many samples an epoch leaves out is known only when it begins, but a schedule and a policy need the
    number of steps before the first. So the steps are planned (`expected_share`) as if 70 % of the losses were below
    the mean, and the training has just so many: the schedule reaches its end, each step costs what it costs, and the
    number of passes over the samples is what varies. `figures` says how many there were. The last phase has 12.5 % of
    the planned epochs at full length; the epoch before it is cut short where it begins. A sample that was not seen yet,
    since an epoch ends with its last full batch, has no loss and stays in.

    Cost: two operations on one batch's numbers at each step, none of which waits for a GPU, and one look at all losses
    an epoch.

    Args:
        share: r, above 0 and below 1.

    Raises:
        UsageError: `share` is no such share; and, at the start, a training that leaves samples out already, or has too
            few for one step.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = _checked(share)

    def on_start(self, training: Training) -> None:
        """Watch the losses."""
        if training.among is not None:
            raise UsageError(
                f"InfoBatch chooses the samples of each epoch, and this training goes through {len(training.among)} of "
                f"{_size(training)} already: leave left_out at 0"
            )
        steps_per_epoch(training.source, training.recipe, self.share)  # what is left makes at least one step
        whole_epochs = _WHOLE * training.recipe.epochs * training.steps_per_epoch
        self._whole_steps = round(whole_epochs * training.total_steps / training.planned_steps)
        self._training = training
        # NaN for a sample that was not seen yet: it is neither above nor below the mean.
        self._loss_N = torch.full((_size(training),), torch.nan, device=training.device)
        self._weight_N = torch.ones(_size(training), device=training.device)
        self._epochs, self._left_out, self._below = 0, 0, 0
        training.weigh = self._weigh

    def on_step(self, training: Training) -> None:
        """Choose the samples of the next epoch."""
        if not training.epoch_ended or training.step >= training.total_steps:
            return
        self._weight_N.fill_(1.0)
        pruned_steps = training.total_steps - self._whole_steps - training.step
        if pruned_steps > 0:
            training.begin_epoch(self._draw(training), pruned_steps)
        else:
            training.begin_epoch(None, training.steps_per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The last losses, the samples of the epoch with their weights, and the counts."""
        return {
            "losses": self._loss_N.to("cpu", copy=True),
            "weights": self._weight_N.to("cpu", copy=True),
            "among": self._training.among,
            "counts": [self._epochs, self._left_out, self._below],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self._loss_N = state["losses"].to(self._training.device, copy=True)
        self._weight_N = state["weights"].to(self._training.device, copy=True)
        self._training.among = state["among"]
        self._epochs, self._left_out, self._below = state["counts"]

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers that go into a trial's result: of all samples, which share was below the mean and left out.

        Both are means over the `pruned_epochs`; `epochs` counts all that were begun.
        """
        samples = max(1, self._epochs) * len(self._loss_N)
        return {
            "share": self.share,
            "epochs": self._training.epochs,
            "pruned_epochs": self._epochs,
            "below_mean": self._below / samples,
            "left_out": self._left_out / samples,
        }

    @torch.no_grad()
    def _weigh(self, ids_B: Tensor, loss_B: Tensor) -> Tensor:
        ids_B = ids_B.to(loss_B.device, non_blocking=True)
        self._loss_N.index_copy_(0, ids_B, loss_B.float())
        return self._weight_N.index_select(0, ids_B)

    def _draw(self, training: Training) -> Tensor:
        """Draw the samples of an epoch, and weigh those with a small loss among them."""
        loss_N = self._loss_N.cpu()
        below_M = (loss_N < loss_N.nanmean()).nonzero().flatten()
        order_M = torch.randperm(len(below_M), generator=generator_for("infobatch", training.seed, training.step))
        left_out = round(self.share * len(below_M))
        self._weight_N[below_M.to(self._weight_N.device)] = 1 / (1 - self.share)
        in_N = torch.ones(len(loss_N), dtype=torch.bool)
        in_N[below_M[order_M[:left_out]]] = False
        self._epochs += 1
        self._below += len(below_M)
        self._left_out += left_out
        return in_N.nonzero().flatten()


def expected_share(share: float, epochs: float) -> float:
    """The share of a training's steps that InfoBatch is expected to take.

    The first epoch is whole, since no loss is known yet, and so are the last ones.
    """
    pruned = max(0.0, epochs - 1 - _WHOLE * epochs)
    return 1 - _checked(share) * _BELOW * pruned / epochs


def _checked(share: float) -> float:
    if not 0 < share < 1:
        raise UsageError(f"share={share}: give a share of the samples with a small loss, above 0 and below 1")
    return share


def _size(training: Training) -> int:
    return training.source.size("train")

"""Full training on a smaller budget: the control that papers leave out."""

from predictor.errors import UsageError, unknown
from predictor.policies.none import NonePolicy

_SCHEDULES = ("linear",)


class ShorterPolicy(NonePolicy):
    """Trains every layer for fewer steps, with the learning-rate schedule rescaled to them.

    Paper: none; the control of every freezing method. The straight line to zero is that of Li et al. (Budgeted
    Training, ICLR 2020, arXiv 1905.04753), and the baseline of No Train No Gain (Kaddour et al., 2023, arXiv
    2307.06440).

    Rule: steps = round(budget * planned steps). With `schedule="linear"` the learning rate falls on a straight line to
    zero after the warm-up, whatever the training's own schedule is.

    Signal: none.

    Differs: Li et al. have no warm-up; the training's own is kept here.

    Cost: none.

    A freezing method that is no better than this one at the same cost has no use. In a loop of your own, plan these
    steps and this schedule yourself: `budget` and `lr_schedule` say which.

    Args:
        budget: the share of the planned steps, above 0 and at most 1.
        schedule: "linear", or None for the training's own.
    """

    def __init__(self, budget: float = 0.7, schedule: str | None = None) -> None:
        if not 0 < budget <= 1:
            raise UsageError(f"budget={budget}: give a share of the planned steps, above 0 and at most 1")
        if schedule is not None and schedule not in _SCHEDULES:
            raise unknown("schedule of a shorter training", schedule, _SCHEDULES)
        self.budget = budget
        self.lr_schedule = schedule

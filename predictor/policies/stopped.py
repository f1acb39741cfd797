"""Early stop at a fixed time: the cheapest control."""

from predictor.errors import UsageError
from predictor.policies.shorter import ShorterPolicy


class StoppedPolicy(ShorterPolicy):
    """Trains every layer and stops early, on the learning-rate schedule of the full training.

    Paper: none; a control. The cool-down is that of schedules which can be stopped at any time (Hägele et al., 2024,
    arXiv 2405.18392).

    Rule: steps = round(budget * planned steps). Over the last share `cooldown` of them the learning rate falls on a
    straight line to zero, from where the schedule has it when the cool-down begins.

    Signal: none.

    Differs: Hägele et al. cool down from a constant rate; this one from where the training's own schedule is.

    Cost: none.

    Under a schedule that ends near zero the last steps change little. Leaving them out may cost less accuracy than a
    whole schedule over as many steps (`shorter`). What a freezing method saves in those steps is no merit of its own.
    In a loop of your own, stop and cool down yourself: `budget` and `lr_cooldown` say when.

    Args:
        budget: the share of the planned steps, above 0 and at most 1.
        cooldown: the last share of these steps, from 0 to 1. 0 stops at the scheduled rate.
    """

    rescaled = False

    def __init__(self, budget: float = 0.85, cooldown: float = 0.0) -> None:
        super().__init__(budget)
        if not 0 <= cooldown <= 1:
            raise UsageError(f"cooldown={cooldown}: give a share of the steps that are taken, from 0 to 1")
        self.lr_cooldown = cooldown

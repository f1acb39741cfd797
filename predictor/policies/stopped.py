"""Early stopping at a fixed time: the cheapest rival of all."""

from predictor.policies.shorter import ShorterPolicy


class StoppedPolicy(ShorterPolicy):
    """Trains every layer, and breaks off before the end: the learning-rate schedule is that of the full training.

    Paper: none; a control. Rule: steps = round(budget * planned steps). Signal: none. Differs: not at all. Cost: none.
    Under a schedule that ends near zero the last steps change little, so that leaving them out may cost less than a
    whole schedule over as many steps (`shorter`): what a method saves there alone is no merit of its own.

    budget: the share of the planned steps, above 0 and at most 1.
    """

    rescaled = False

    def __init__(self, budget: float = 0.85) -> None:
        super().__init__(budget)

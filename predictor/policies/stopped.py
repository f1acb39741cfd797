"""Early stop at a fixed time: the cheapest control."""

from predictor.policies.shorter import ShorterPolicy


class StoppedPolicy(ShorterPolicy):
    """Trains every layer and stops early, on the learning-rate schedule of the full training.

    Paper: none; a control.

    Rule: steps = round(budget * planned steps).

    Signal: none.

    Differs: nothing.

    Cost: none.

    Under a schedule that ends near zero the last steps change little. Leaving them out may cost less accuracy than a
    whole schedule over as many steps (`shorter`). What a freezing method saves in those steps is no merit of its own.

    Args:
        budget: the share of the planned steps, above 0 and at most 1.
    """

    rescaled = False

    def __init__(self, budget: float = 0.85) -> None:
        super().__init__(budget)

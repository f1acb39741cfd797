"""Full training on a smaller budget: the control that papers leave out."""

from predictor.errors import UsageError
from predictor.policies.none import NonePolicy


class ShorterPolicy(NonePolicy):
    """Trains every layer for fewer steps, with the learning-rate schedule rescaled to them.

    Paper: none; the control of every freezing method.

    Rule: steps = round(budget * planned steps).

    Signal: none.

    Differs: nothing.

    Cost: none.

    A freezing method that is no better than this one at the same cost has no use.

    Args:
        budget: the share of the planned steps, above 0 and at most 1.
    """

    def __init__(self, budget: float = 0.7) -> None:
        if not 0 < budget <= 1:
            raise UsageError(f"budget={budget}: give a share of the planned steps, above 0 and at most 1")
        self.budget = budget

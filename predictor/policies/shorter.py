"""Budget-matched full training: the rival that papers leave out."""

from predictor.errors import UsageError
from predictor.policies.none import NonePolicy


class ShorterPolicy(NonePolicy):
    """Trains every layer for fewer steps, with the learning-rate schedule rescaled to them.

    Paper: none; the control of every freezing method. Rule: steps = round(budget * planned steps). Signal: none.
    Differs: not at all. Cost: none. A freezing method that cannot beat it at its own cost is not worth having.

    budget: the share of the planned steps, above 0 and at most 1.
    """

    def __init__(self, budget: float = 0.7) -> None:
        if not 0 < budget <= 1:
            raise UsageError(f"budget={budget}: give a share of the planned steps, above 0 and at most 1")
        self.budget = budget

"""Full training: nothing freezes."""

from predictor.policies.base import FreezePolicy, View


class NonePolicy(FreezePolicy):
    """Freezes nothing.

    Paper: none.

    Rule: the frozen set is empty.

    Signal: none.

    Differs: nothing.

    Cost: none.
    """

    freezes = False

    def due(self, step: int, total_steps: int) -> bool:
        """Never."""
        return False

    def decide(self, view: View) -> frozenset[int]:
        """The empty set."""
        return frozenset()

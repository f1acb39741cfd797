"""What prefixes cost that froze before the first step, and what the first batches' gradients said: runs to fit on."""

from collections.abc import Iterable

from data.outcomes.accuracy_cost import accuracy_costs
from data.outcomes.records import Outcome
from predictor.errors import UsageError
from predictor.model.first_look import FirstLook
from predictor.training.first_prefix import FirstPrefixes

_COMMAND = "`python -m collect gather outcomes --points 0`"


def first_prefixes(outcomes: Iterable[Outcome], scratch: bool = False) -> list[FirstPrefixes]:
    """The runs that have prefixes frozen from step 0 and a look at their first batches, in the order of the outcomes.

    Those from scratch, or the others, which have a model of their own. Raises UsageError where there is none.
    """
    outcomes = tuple(outcomes)
    from_start = [each for each in outcomes if each.kind == "unfrozen" or (each.kind == "front" and each.step == 0)]
    costs = accuracy_costs(from_start)
    looked = {each.run_id: each for each in from_start if each.kind == "unfrozen" and "look" in each.facts}
    runs = []
    for run_id, cost in costs.items():
        run = looked.get(run_id)
        if run is not None and cost.step_P[0] == 0:
            look = FirstLook.from_dict(run.facts["look"])
            if look.from_scratch != scratch:
                continue
            size_F = cost.prefix_F[1:]
            paid_F = cost.cost([0])[0][size_F - 1]
            lost_F = cost.signed_PF[0][1:] if scratch else paid_F
            runs.append(
                FirstPrefixes(run.workload, run.family, look, run.total_steps, size_F, paid_F, cost.flops(), lost_F)
            )
    if not runs:
        which = "run from scratch" if scratch else "run"
        raise UsageError(f"no {which} has prefixes frozen from step 0 and a look at its first batches: see {_COMMAND}")
    return runs

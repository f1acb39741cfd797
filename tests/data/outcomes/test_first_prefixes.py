"""From outcomes to runs whose prefixes froze before the first step."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data.outcomes.first_prefixes import first_prefixes
from data.outcomes.records import Outcome, Result
from predictor.errors import UsageError
from predictor.model.first_look import FirstLook

LOOK = FirstLook(8, *((1.0,) * 4,) * 6, (10,) * 4)
UNFROZEN = Result("finished", 0.5, 0.8)


def outcome(kind, layers, loss, **changes):
    names = tuple(f"layer{index}" for index in layers)
    result = Result("finished", loss, 0.8 - 0.4 * (loss - 0.5))
    whole = Outcome(
        "r", "w", "vgg", "digits", 0, kind, 0, 100, layers, names, 4, 0, 1 - len(layers) / 5, result, UNFROZEN
    )
    return replace(whole, **changes)


OUTCOMES = [
    outcome("unfrozen", (), 0.5, facts={"look": LOOK.as_dict()}),
    outcome("front", (0, 1), 0.55),
    outcome("front", (0, 1, 2, 3), 0.9),
    outcome("front", (0, 1, 2, 3), 0.6, step=50),  # no prefix of the first step
]


def test_a_run_by_hand():
    (run,) = first_prefixes(OUTCOMES)
    assert run.size_F.tolist() == [2, 4]
    assert run.cost_F == pytest.approx([2.0, 16.0])  # 40 percentage points per unit of loss
    assert run.step_F == pytest.approx(np.interp(range(5), (0, 2, 4), (1.0, 0.6, 0.2)))
    assert run.look == LOOK
    assert run.steps == 100


@pytest.mark.parametrize("outcomes", [OUTCOMES[1:], OUTCOMES[:1] + OUTCOMES[3:]])
def test_without_a_look_or_without_prefixes_there_is_no_run(outcomes):
    with pytest.raises(UsageError, match="no run has prefixes frozen from step 0"):
        first_prefixes(outcomes)


def of_run(name, evidence):
    facts = {**OUTCOMES[0].facts, "look": replace(LOOK, evidence_L=evidence).as_dict()}
    return [replace(each, run_id=name) for each in [replace(OUTCOMES[0], facts=facts), *OUTCOMES[1:]]]


def test_runs_from_scratch_are_apart():
    outcomes = [*of_run("new", (0.0, 1.0, 0.0, 0.0)), *of_run("one", (9.0, 9.0, 0.0, 0.0)), *of_run("other", ())]
    assert [run.look.from_scratch for run in first_prefixes(outcomes)] == [False, False]
    assert [run.look.from_scratch for run in first_prefixes(outcomes, scratch=True)] == [True]
    with pytest.raises(UsageError, match="no run from scratch has prefixes frozen from step 0"):
        first_prefixes(outcomes[4:], scratch=True)


def test_from_scratch_chance_below_zero_stays_in_the_mean():
    lucky = [outcome("front", (0,), 0.45), outcome("front", (0, 1, 2), 0.54)]
    (run,) = first_prefixes(
        [*of_run("new", (0.0,) * 4), *(replace(each, run_id="new") for each in lucky)], scratch=True
    )
    assert run.size_F.tolist() == [1, 2, 3, 4]
    assert run.lost_F == pytest.approx([-2.0, 2.0, 1.6, 16.0])
    assert run.cost_F[0] == 0
    assert (np.diff(run.cost_F) >= 0).all()
    (run,) = first_prefixes([*of_run("old", (9.0,) * 4), *(replace(each, run_id="old") for each in lucky)])
    assert run.lost_F is run.cost_F


def test_costs_are_finite():
    assert all(math.isfinite(cost) for run in first_prefixes(OUTCOMES) for cost in run.cost_F)

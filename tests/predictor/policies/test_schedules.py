"""SmartFRZ under every scheduler: judged wherever the rate falls to the end, and never at the bottom of a cycle."""

import pytest

from tests.predictor.schedulers import SCHEDULERS, judged_under, rates_under, rises, train

STEPS = 600
TO_THE_END = [name for name in SCHEDULERS if not rises(name)]
LATE = ("StepLR", "MultiStepLR", "ExponentialLR to a", "Plateau", "three phases", "80 %")
"""In the names of those under which windows are not whole all the time: the rate drops, or falls early and far."""
# A cosine that ends early cannot be told from one that ends early and is followed by an average's rate.
UNFORESEEN = "SequentialLR: cosine, SWALR"


@pytest.fixture(autouse=True)
def _without_transformers_nothing_of_it(request):
    parameters = getattr(request.node, "callspec", None)
    name = parameters.params["name"] if parameters else ""
    if "schedule" in name and not name.startswith("own"):
        pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of SequentialLR itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_layer_is_judged_at_a_rate_far_below_one_that_follows(name):
    rates = rates_under(name, STEPS)
    judged = [step for step in judged_under(rates) if step < STEPS]
    again = max((max(rates[step:]) / rates[step - 1] for step in judged), default=0)
    assert again < (5 if name == UNFORESEEN else 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TO_THE_END)
def test_layers_are_judged_where_the_rate_falls_to_the_end(name):
    judged = judged_under(rates_under(name, STEPS))
    assert judged[-1] >= STEPS * 0.9
    if not any(part in name for part in LATE):
        assert judged == list(range(9 * STEPS // 60, STEPS + 1, STEPS // 60))


def test_a_training_under_restarts_freezes_nothing_before_its_last_cycle():
    name = "CosineAnnealingWarmRestarts, 4 cycles"
    plain, _ = train("none", 0, name, epochs=2)
    accuracy, ended = train("smartfrz", 0, name, epochs=2)
    assert ended is None or ended > 0.75
    assert accuracy > plain - 3

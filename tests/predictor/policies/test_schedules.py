"""SmartFRZ under every scheduler: it predicts where the rate falls to the end, never at the bottom of a cycle."""

import pytest

from tests.predictor.schedulers import SCHEDULERS, predicted_under, rates_under, rises, train

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
def test_nothing_is_predicted_at_a_rate_far_below_one_that_follows(name):
    rates = rates_under(name, STEPS)
    predicted = [step for step in predicted_under(rates) if step < STEPS]
    again = max((max(rates[step:]) / rates[step - 1] for step in predicted), default=0)
    assert again < (5 if name == UNFORESEEN else 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TO_THE_END)
def test_it_predicts_where_the_rate_falls_to_the_end(name):
    predicted = predicted_under(rates_under(name, STEPS))
    assert predicted[-1] >= STEPS * 0.9
    if not any(part in name for part in LATE):
        assert predicted == list(range(9 * STEPS // 60, STEPS + 1, STEPS // 60))


def test_a_training_under_restarts_freezes_nothing_before_its_last_cycle():
    name = "CosineAnnealingWarmRestarts, 4 cycles"
    plain, _ = train("none", 0, name, epochs=2)
    accuracy, ended = train("smartfrz", 0, name, epochs=2)
    assert ended is None or ended > 0.75
    assert accuracy > plain - 3

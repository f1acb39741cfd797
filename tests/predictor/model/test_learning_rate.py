"""What counts as a rate that has risen again."""

import pytest

from predictor.model.learning_rate import RateSoFar


def noted(*rates):
    rate = RateSoFar()
    rose = []
    for lr in rates:
        rate.note(lr)
        rose.append(rate.rose)
    return rate, [index for index, each in enumerate(rose) if each]


@pytest.mark.parametrize(
    ("rates", "rises"),
    [
        ([0.0, 0.0, 0.1, 0.5, 1.0, 0.5], []),  # a warm-up
        ([1.0, 0.9, 0.5, 0.2, 0.0], []),
        ([1.0, 0.8, 0.3, 0.5, 0.55], []),  # by less than to twice the lowest
        ([1.0, 0.6, 1.0, 0.6, 1.0], []),  # from more than half of the peak
        ([1.0, 0.8, 0.3, 0.7, 0.9], [3]),
        ([1.0, 0.8, 0.1, 0.3, 0.5, 0.7], [3, 5]),  # each doubling
        ([1.0, 0.8, 0.1, 5.0], [3]),  # above the peak
        ([1.0, 0.8, 0.0, 0.0, 0.1], [4]),
        ([1.0, 0.1, 0.5, 1.0], []),  # the first was never used: a warm-up
    ],
)
def test_a_rise_is_to_twice_the_lowest_since_the_peak(rates, rises):
    rate, found = noted(*rates)
    assert found == rises
    assert rate.has_risen == bool(rises)
    assert rate.peak == max(rates)


def test_a_low_rate_may_rise_again_only_where_it_has_before():
    assert not noted(1.0, 0.8, 0.1)[0].may_rise_again(0.5)
    rate, _ = noted(1.0, 0.8, 0.1, 0.6, 0.3)
    assert rate.may_rise_again(0.5)
    assert not rate.may_rise_again(0.8)


def test_a_loop_that_sets_the_rate_of_each_step_has_its_peak_ahead():
    rate, _ = noted(1.0, 0.1, 0.2)
    assert rate.peak == 0.2
    assert rate.log == 0.0

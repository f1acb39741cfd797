"""The label rule, by hand."""

import numpy as np
import pytest

from data.trajectories.labels import LabelRule
from predictor.errors import UsageError

NAN = np.nan


def labels(values, **rule):
    similarity_T1 = np.array(values, dtype=np.float32)[:, None]
    return LabelRule(**rule).labels(similarity_T1)[:, 0].astype(int).tolist()


def test_a_layer_may_be_frozen_from_where_it_stays_similar_to_the_end():
    assert labels([0.1, 0.99, 0.97, 0.98, 0.99, 1.0]) == [0, 0, 0, 1, 1, 1]
    assert labels([1.0, 1.0, 0.5]) == [0, 0, 0]
    assert labels([1.0, 1.0, 1.0]) == [1, 1, 1]
    assert labels([0.99]) == [1]


def test_the_threshold_is_reached_by_what_was_stored_as_that_number():
    for threshold in (0.98, 0.9, 0.3, 0.7):
        assert labels([threshold, threshold], threshold=threshold) == [1, 1]


def test_another_threshold():
    assert labels([0.4, 0.6, 0.55, 0.9], threshold=0.5) == [0, 1, 1, 1]


def test_a_dip_is_forgiven_later_but_not_at_the_start():
    assert labels([0.99, 0.96, 0.99, 1.0]) == [0, 0, 1, 1]
    assert labels([0.99, 0.96, 0.99, 1.0], dip=0.03) == [1, 0, 1, 1]
    assert labels([0.99, 0.94, 0.99, 1.0], dip=0.03) == [0, 0, 1, 1]


def test_a_missing_similarity_is_no_label_and_no_verdict_on_earlier_ones():
    assert labels([0.99, NAN, 0.99]) == [1, 0, 1]
    assert labels([0.99, NAN, 0.5, 0.99]) == [0, 0, 0, 1]
    assert labels([NAN, NAN]) == [0, 0]


def test_layers_are_judged_apart():
    similarity_TL = np.array([[0.99, 0.1], [0.99, 0.99]], dtype=np.float32)
    np.testing.assert_array_equal(LabelRule().labels(similarity_TL), [[True, False], [True, True]])


@pytest.mark.parametrize("rule", [{"threshold": 0}, {"threshold": 1.1}, {"threshold": NAN}, {"dip": -1}, {"dip": 0.99}])
def test_rules_that_cannot_be(rule):
    with pytest.raises(UsageError, match=next(iter(rule))):
        LabelRule(**rule)

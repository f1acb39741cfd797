"""Figures worked out by hand."""

import numpy as np
import pytest

from predictor.training.metrics import (
    calibration,
    calibration_error,
    choose_threshold,
    false_freezes_at_half,
    figures_of,
    freezes_at,
    mean_figures,
)

LABELS = np.array([True, True, False, True, False, False])
PROBABILITY = np.array([0.95, 0.85, 0.75, 0.65, 0.35, 0.05])


def test_figures_by_hand():
    figures = figures_of(LABELS, PROBABILITY, threshold=0.6)
    assert figures["windows"] == 6
    assert figures["freezable"] == 0.5
    assert figures["accuracy"] == pytest.approx(5 / 6)
    assert figures["auroc"] == pytest.approx(8 / 9)  # of the nine pairs only (.75, .65) stands the wrong way round
    assert figures["precision_freezable"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert figures["precision_not_yet"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    squares = (0.05**2, 0.15**2, 0.75**2, 0.35**2, 0.35**2, 0.05**2)
    assert figures["brier"] == pytest.approx(sum(squares) / 6)
    assert figures["calibration_error"] == pytest.approx((0.05 + 0.15 + 0.75 + 0.35 + 0.35 + 0.05) / 6)
    assert figures["found"] == 1.0
    assert figures["wrongly_frozen"] == pytest.approx(1 / 3)  # of the three that are not yet freezable
    assert figures["false_freezes"] == pytest.approx(1 / 4)  # of the four freezes


@pytest.mark.parametrize(("allowed", "threshold"), [(0.0, 0.85), (0.24, 0.85), (0.25, 0.65), (0.4, 0.35), (0.5, 0.05)])
def test_the_threshold_is_the_lowest_with_so_few_false_freezes(allowed, threshold):
    assert choose_threshold(LABELS, PROBABILITY, allowed) == threshold
    assert freezes_at(LABELS, PROBABILITY, threshold)["false_freezes"] <= allowed


def test_equal_probabilities_are_frozen_together():
    labels, probability = np.array([True, True, False]), np.array([0.8, 0.6, 0.6])
    assert choose_threshold(labels, probability, 0.1) == 0.8
    assert choose_threshold(labels[::-1], probability, 0.1) == 1.0  # the first is now a false freeze


def test_where_nothing_may_freeze_the_threshold_is_one():
    assert choose_threshold(~LABELS, PROBABILITY, 0.0) == 1.0
    assert choose_threshold(np.array([], bool), np.array([]), 0.1) == 1.0
    assert freezes_at(~LABELS, PROBABILITY, 1.0)["false_freezes"] is None


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_has_no_ranking_but_all_else(label):
    figures = figures_of(np.full(6, label), PROBABILITY, 0.6)
    assert figures["auroc"] is figures["precision_freezable"] is figures["precision_not_yet"] is None
    assert (figures["found"] is None) == (not label)
    assert (figures["wrongly_frozen"] is None) == label
    assert figures["accuracy"] == pytest.approx(4 / 6 if label else 2 / 6)


def test_no_windows_have_no_figures():
    assert figures_of(np.array([], bool), np.array([]), 0.5) == {"windows": 0}


def test_calibration_by_hand():
    labels = np.array([True, False, True, True, True])
    bins = calibration(labels, np.array([0.12, 0.18, 0.91, 0.99, 1.0]))
    assert bins == [
        {"predicted": pytest.approx(0.15), "observed": 0.5, "windows": 2},
        {"predicted": pytest.approx((0.91 + 0.99 + 1) / 3), "observed": 1.0, "windows": 3},
    ]
    assert calibration_error(bins) == pytest.approx((2 * 0.35 + 3 * (1 - 2.9 / 3)) / 5)


def test_means_leave_out_what_is_not_there():
    rows = [{"windows": 2, "auroc": 0.5, "found": None}, {"windows": 3, "auroc": 0.9, "found": None}]
    assert mean_figures(rows) == {"windows": 5, "auroc": pytest.approx(0.7), "found": None}


def test_false_freezes_where_half_of_all_freezable_windows_are_frozen():
    # Two of the three freezable ones make half: those of .95 and .85. At .75 a wrong one would come.
    assert false_freezes_at_half(LABELS, PROBABILITY) == 0.0
    assert false_freezes_at_half(LABELS, 1 - PROBABILITY) == pytest.approx(3 / 5)  # .95, .65 and .25 before .15
    assert figures_of(LABELS, 1 - PROBABILITY, 0.99)["false_freezes_at_half"] == pytest.approx(3 / 5)
    # One of two is half, and equal probabilities are frozen together.
    labels, probability = np.array([True, False, True, False]), np.array([0.4, 0.4, 0.2, 0.1])
    assert false_freezes_at_half(labels, probability) == 0.5
    # One probability for all freezes all: false is then the share of what is not freezable.
    assert false_freezes_at_half(LABELS, np.full(6, 0.3)) == 0.5
    # The scale of the probabilities does not matter.
    assert false_freezes_at_half(LABELS, PROBABILITY / 100) == 0.0
    assert false_freezes_at_half(np.ones(6, bool), PROBABILITY) is None
    assert false_freezes_at_half(np.zeros(6, bool), PROBABILITY) is None

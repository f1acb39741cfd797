"""Calibration: a line through the logits, known where the truth is known."""

import numpy as np
import pytest
import torch

from predictor.model.network import FreezePredictor, PredictorConfig
from predictor.training.calibration import Calibration, fit_calibration


def logit(probability):
    return np.log(probability / (1 - probability))


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def test_what_was_too_sure_of_itself_is_brought_back_to_the_truth():
    chance = np.random.default_rng(0)
    truth = chance.uniform(0.02, 0.98, 200_000)
    found = fit_calibration(chance.random(truth.size) < truth, sigmoid(2 * logit(truth) + 1))
    # truth's logit = half of what was said, less a half
    assert (found.slope, found.shift) == (pytest.approx(0.5, abs=0.01), pytest.approx(-0.5, abs=0.02))
    assert np.abs(found(sigmoid(2 * logit(truth) + 1)) - truth).max() < 0.01


def test_the_order_stays_as_it_is_and_certainty_is_a_finite_number():
    given = np.array([0.0, 1e-12, 0.3, 0.999, 1.0])
    calibrated = Calibration(0.5, -0.2)(given)
    assert np.isfinite(calibrated).all()
    assert (np.diff(calibrated) >= 0).all()


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4, [True, True, False, False]])
def test_without_a_line_that_rises_nothing_changes(labels):
    probability = np.array([0.1, 0.2, 0.8, 0.9])  # of the last labels each is wrong
    assert fit_calibration(np.array(labels), probability) == Calibration(1.0, 0.0)


def test_the_model_answers_what_the_calibration_says():
    torch.manual_seed(0)
    model = FreezePredictor(PredictorConfig(window=3, weights=4)).eval()
    tokens = torch.randn(5, 2, model.config.width)
    with torch.no_grad():
        before = model.judge(tokens).sigmoid().double().numpy()
        model.calibrate(0.6, -0.3)
        after = model.judge(tokens).sigmoid().double().numpy()
    assert after == pytest.approx(Calibration(0.6, -0.3)(before), abs=1e-6)

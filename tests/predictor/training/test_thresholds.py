"""Thresholds for a risk: a replay by hand, predictors that have not seen the family that they predict, calibration."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.training.config import FitConfig
from predictor.training.dataset import RunWindows, WindowSet
from predictor.training.fit import fit
from predictor.training.thresholds import (
    Calibration,
    fit_calibration,
    thresholds_for,
    with_risks,
    without_own_family,
)


def run_of(name, cost, flops):
    """Snapshots of two layers, one weight each."""
    cost_TL = torch.tensor(cost, dtype=torch.float64)
    snapshots, layers = cost_TL.shape
    weights, features = torch.zeros(snapshots, layers, 1), torch.zeros(snapshots, layers, 9)
    flops_F = torch.tensor(flops).double()
    return RunWindows(name, "mlp", "digits", weights, features, cost_TL <= 0.5, cost_TL=cost_TL, flops_F=flops_F)


COST = [[8.0, 9.0], [4.0, 6.0], [1.0, 2.0], [0.0, 0.0]]
RUN = run_of("a", COST, [1.0, 0.7, 0.4])


def test_a_prefix_that_grows_costs_what_it_grows_by():
    windows = WindowSet((RUN,), window=2)  # predicted at the snapshots 1, 2 and 3
    probability = np.array([0.8, 0.2, 0.3, 0.9, 0.95, 0.97])
    by_risk = {row.risk: row for row in thresholds_for(windows, probability, [0.0, 4.0, 5.0])}
    # Layer 0 saves .3 of a step, so that at 1/3 and below its doubt of .2 will do: it freezes at snapshot 1 for 4
    # points. Layer 1 follows at snapshot 2, where the lower of both has .3, for 2 - 1 more.
    assert by_risk[5.0].threshold <= 0.3
    assert by_risk[5.0].points == pytest.approx(5.0)
    assert by_risk[5.0].flops == pytest.approx((1 + 0.7 + 0.4) / 3)
    # Above 1/3 nothing freezes before snapshot 3, where both layers do, for nothing.
    assert by_risk[0.0].threshold > 1 / 3
    assert by_risk[0.0].points == 0
    assert by_risk[0.0].flops == 1  # no step follows
    # Between .3 and 1/3 layer 0 freezes, and layer 1 waits for snapshot 3.
    assert 0.3 < by_risk[4.0].threshold <= 1 / 3
    assert by_risk[4.0].points == pytest.approx(4.0)
    assert by_risk[4.0].flops == pytest.approx((1 + 0.7 + 0.7) / 3)


def test_a_layer_behind_one_that_trains_does_not_freeze():
    windows = WindowSet((RUN,), window=2)
    (row,) = thresholds_for(windows, np.array([0.1, 0.9, 0.1, 0.9, 0.1, 0.9]), [3.9])
    # At .1 both layers freeze at once, for 6 points; above it the second would, but the first one trains.
    assert 0.1 < row.threshold <= 0.9
    assert (row.points, row.flops) == (0, 1)


def test_risks_are_means_over_runs_and_what_cannot_be_kept_freezes_nothing():
    windows = WindowSet((RUN, run_of("b", [[10.0, 10.0]] * 4, [1.0, 0.7, 0.4])), window=2)
    (row,) = thresholds_for(windows, np.ones(12), [1.0])
    assert (row.threshold, row.points, row.flops) == (1.0, 0.0, 1.0)


def test_what_a_risk_costs_elsewhere_follows_from_the_thresholds_of_other_families():
    # Predicted at the snapshots 1 to 3. One run loses 5 points at .3 and below; the other one 1 at .2.
    other = replace(run_of("b", [[1.0, 1.0]] * 3 + [[0.0, 0.0]], [1.0, 0.8, 0.6]), family="vit")
    windows = WindowSet((RUN, other), window=2)
    probability = np.array([0.8, 0.2, 0.3, 0.1, 0.95, 0.97, 0.2, 0.2, 0.3, 0.2, 0.95, 0.97])
    (row,) = thresholds_for(windows, probability, [1.0])
    # Together they lose 2.5 points at .3, so the threshold lies above it, where less is lost.
    assert row.threshold > 0.3
    assert (row.points, row.flops) == (0, 1)
    # The MLP alone has its threshold above .8, and there the ViT loses nothing; the ViT alone lets all freeze, for 1
    # point, and there the MLP loses 6 at once.
    assert row.points_elsewhere == pytest.approx((6 + 0) / 2)
    assert row.flops_elsewhere == pytest.approx(((0.4 * 2 + 1) / 3 + 1) / 2)


def test_of_one_family_nothing_is_known_elsewhere():
    (row,) = thresholds_for(WindowSet((RUN,), window=2), np.ones(6), [0.5])
    assert (row.points_elsewhere, row.flops_elsewhere) == (None, None)


def test_of_unmeasured_runs_there_is_no_risk(make_windows):
    windows = make_windows(each=1)
    with pytest.raises(UsageError, match="not known what freezing costs"):
        thresholds_for(windows, np.zeros(len(windows)), [0.5])


def test_the_calibration_does_not_know_the_labels_of_test_runs(make_windows, monkeypatch):
    windows = measured(make_windows(each=3))
    config, settings = PredictorConfig(window=6, weights=32, hidden=8, key=4), FitConfig(epochs=1, epoch_windows=256)
    noise_N = torch.rand(len(windows), generator=torch.Generator().manual_seed(0)).numpy()
    probability_N = 0.1 + 0.5 * windows.labels_N.numpy() + 0.3 * noise_N
    monkeypatch.setattr("predictor.training.thresholds.without_own_family", lambda *_: probability_N)
    result = fit(windows, SampleSpec(weights=32, snapshots=23), config, settings, progress=False)

    def calibration_of(windows):
        return with_risks(result, windows, config, settings)[1]["calibration"]

    found = calibration_of(windows)
    assert found["slope"] not in (0, 1)
    assert found["on_test_runs"] is False
    assert calibration_of(spoilt(windows, result.split.test)) == found
    assert calibration_of(spoilt(windows, result.split.train[:1])) != found


def measured(windows):
    """Freezing too early costs two points in each of these runs."""
    flops_F = torch.linspace(1, 0.4, 5).double()
    runs = (replace(run, cost_TL=2.0 * (~run.labels_TL).double(), flops_F=flops_F) for run in windows.runs)
    return replace(windows, runs=tuple(runs))


def spoilt(windows, indices):
    """The labels of some runs are inverted."""
    runs = (
        replace(run, labels_TL=~run.labels_TL) if index in indices else run for index, run in enumerate(windows.runs)
    )
    return replace(windows, runs=tuple(runs))


def test_each_family_is_predicted_from_the_others_alone(make_windows):
    config = PredictorConfig(window=6, weights=32, hidden=16, key=8)
    settings = FitConfig(epochs=2, epoch_windows=500)
    windows = make_windows(each=4)
    before = without_own_family(windows, config, settings)
    # Other labels of one family change the predictions for the others, and not those for itself.
    poisoned = replace(
        windows,
        runs=tuple(replace(run, labels_TL=~run.labels_TL) if run.family == "vit" else run for run in windows.runs),
    )
    after = without_own_family(poisoned, config, settings)
    own = np.array([windows.runs[index].family == "vit" for index in windows.index[:, 0].tolist()])
    assert np.array_equal(before[own], after[own])
    assert not np.array_equal(before[~own], after[~own])
    with pytest.raises(UsageError, match="two families"):
        without_own_family(make_windows(families=("mlp",)), config, settings)


def logit(probability):
    return np.log(probability / (1 - probability))


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def test_probabilities_that_are_too_extreme_are_brought_back_to_the_truth():
    chance = np.random.default_rng(0)
    truth = chance.uniform(0.02, 0.98, 200_000)
    found = fit_calibration(chance.random(truth.size) < truth, sigmoid(2 * logit(truth) + 1))
    # the truth's logit is half of the predicted one, less a half
    assert (found.slope, found.shift) == (pytest.approx(0.5, abs=0.01), pytest.approx(-0.5, abs=0.02))
    assert np.abs(found(sigmoid(2 * logit(truth) + 1)) - truth).max() < 0.01


def test_the_order_stays_as_it_is_and_certainty_is_a_finite_number():
    given = np.array([0.0, 1e-12, 0.3, 0.999, 1.0])
    calibrated = Calibration(0.5, -0.2)(given)
    assert np.isfinite(calibrated).all()
    assert (np.diff(calibrated) >= 0).all()


@pytest.mark.parametrize("labels", [[True] * 4, [False] * 4, [True, True, False, False]])
def test_if_no_rising_calibration_fits_nothing_changes(labels):
    probability = np.array([0.1, 0.2, 0.8, 0.9])  # of the last labels each is wrong
    assert fit_calibration(np.array(labels), probability) == Calibration(1.0, 0.0)


def test_a_calibrated_model_gives_calibrated_probabilities():
    torch.manual_seed(0)
    model = FreezePredictor(PredictorConfig(window=3, weights=4)).eval()
    tokens = torch.randn(5, 2, model.config.width)
    with torch.no_grad():
        before = model(tokens).sigmoid().double().numpy()
        Calibration(0.6, -0.3).apply_to(model)
        after = model(tokens).sigmoid().double().numpy()
    assert after == pytest.approx(Calibration(0.6, -0.3)(before), abs=1e-6)

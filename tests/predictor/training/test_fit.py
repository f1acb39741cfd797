"""Training a predictor, and the figures on unseen runs."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from predictor.errors import DivergedError, UsageError
from predictor.model.config import FEATURES, PredictorConfig
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.shared.files import read_json_lines
from predictor.shared.tracking import start_tracker
from predictor.training.baselines import FromFeatures, HandMade, Majority, Trees
from predictor.training.config import FitConfig
from predictor.training.dataset import WindowSet
from predictor.training.evaluation import CLASSIFIERS, known, panel_of, transfer
from predictor.training.fit import _hide_clock, fit, fit_on, fit_scaling, pick_device
from predictor.training.metrics import auroc

SPEC = SampleSpec(weights=32, snapshots=23)
CONFIG = PredictorConfig(window=6, weights=32, hidden=16, key=8)
QUICK = FitConfig(epochs=12, patience=12, device="cpu", learning_rate=0.01)


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def relabelled(windows, label):
    """Every window of the set with the same label, or with the opposite of its own."""
    turn = torch.logical_not if label is None else lambda labels: torch.full_like(labels, label)
    return replace(windows, runs=tuple(replace(run, labels_TL=turn(run.labels_TL)) for run in windows.runs))


def figures_on_test_runs(windows, result, settings, learn_from=None):
    """The figures on the test runs."""
    return known(panel_of(windows, result, settings, learn_from), windows.subset(result.split.test))


def test_it_learns_more_than_progress_and_depth(make_windows):
    windows = make_windows()
    result = fit(windows, SPEC, CONFIG, QUICK, progress=False)
    figures = figures_on_test_runs(windows, result, QUICK)
    overall = figures["overall"]
    assert list(overall) == list(CLASSIFIERS)
    assert overall["attention"]["auroc"] > 0.95 > overall["clock"]["auroc"] > overall["majority"]["auroc"] == 0.5
    assert overall["attention"]["accuracy"] > overall["majority"]["accuracy"] + 0.2
    assert set(figures["families"]) == {"mlp", "vgg", "vit"}
    assert sum(row["attention"]["windows"] for row in figures["families"].values()) == overall["attention"]["windows"]
    assert sum(row["windows"] for row in figures["calibration"]) == overall["attention"]["windows"]
    assert 0 < result.threshold <= 1
    assert result.file({}).spec == SPEC


def test_the_same_seed_gives_the_same_predictor_and_leaves_the_random_state_alone(make_windows):
    windows = make_windows(each=2)
    short = replace(QUICK, epochs=2)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    models = [fit(windows, SPEC, CONFIG, settings, progress=False).fitted.model for settings in (short, short)]
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(*models)
    other = fit(windows, SPEC, CONFIG, replace(short, seed=1), progress=False).fitted.model
    assert not same_weights(models[0], other)


def test_the_best_epoch_is_kept_and_patience_ends_it(make_windows):
    windows = make_windows(each=2)
    # The validation labels are the opposite, so that every epoch makes it worse.
    fitted = fit_on(windows, relabelled(windows, None), CONFIG, replace(QUICK, epochs=30, patience=3))
    losses = [row["validation_loss"] for row in fitted.history]
    assert fitted.best_epoch == 1 + losses.index(min(losses))
    assert len(losses) == fitted.best_epoch + 3
    again = fit_on(windows, windows, CONFIG, replace(QUICK, epochs=30, patience=3))
    kept = torch.as_tensor(fitted.probability_N(windows)).clamp(1e-7, 1 - 1e-7)
    loss = torch.nn.functional.binary_cross_entropy(kept, (~windows.labels_N).double())
    assert float(loss) == pytest.approx(min(losses), rel=1e-3)
    assert again.history[0]["validation_loss"] < losses[0]


def test_figures_do_not_depend_on_the_test_runs(make_windows):
    windows = make_windows(each=3)
    short = replace(QUICK, epochs=2)
    one = fit(windows, SPEC, CONFIG, short, progress=False)
    spoilt = list(windows.runs)
    for run in one.split.test:
        spoilt[run] = replace(spoilt[run], labels_TL=~spoilt[run].labels_TL)
    other = fit(WindowSet(tuple(spoilt), 6), SPEC, CONFIG, short, progress=False)
    assert same_weights(one.fitted.model, other.fitted.model)
    assert one.threshold == other.threshold


def test_it_may_be_trained_on_labels_of_another_rule_and_tested_on_its_own(make_windows):
    windows = make_windows(each=2)
    short = replace(QUICK, epochs=4)
    result = fit(windows, SPEC, CONFIG, short, learn_from=relabelled(windows, None), progress=False)
    assert (
        figures_on_test_runs(windows, result, short, relabelled(windows, None))["overall"]["attention"]["auroc"] < 0.3
    )


def test_epochs_are_logged(make_windows, tmp_path):
    with start_tracker("train", "off", tmp_path, {}) as tracker:
        fit(make_windows(each=2), SPEC, CONFIG, replace(QUICK, epochs=3), progress=False, tracker=tracker)
    rows = read_json_lines(tmp_path / "metrics.jsonl")[1:]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"train_loss", "validation_loss", "validation_auroc", "learning_rate"} <= set(rows[0])


def test_an_epoch_sees_no_more_windows_than_asked(make_windows, monkeypatch):
    seen = []
    forward = FreezePredictor.forward
    noting = lambda self, tokens: seen.append(len(tokens)) or forward(self, tokens)  # noqa: E731
    monkeypatch.setattr(FreezePredictor, "forward", noting)
    windows = make_windows(each=1)
    fit_on(windows, windows, CONFIG, replace(QUICK, epochs=1, epoch_windows=40, batch_size=16))
    assert seen == [16, 16, 8, len(windows)]


def test_the_clock_is_hidden_window_by_window_and_nothing_else_is():
    model = FreezePredictor(CONFIG)
    model.scaling.mean.copy_(torch.arange(15.0))
    tokens = torch.full((2000, 5, 15), 77.0)
    hidden = _hide_clock(model, tokens, 0.3)
    assert torch.equal(hidden[..., :6], tokens[..., :6])
    assert torch.equal(hidden[..., 9:], tokens[..., 9:])
    whole = (hidden[..., 6:9] == model.scaling.mean[6:9]).flatten(1)
    assert torch.equal(whole.all(1), whole.any(1))
    assert 0.25 < whole.all(1).float().mean() < 0.35
    assert torch.equal(_hide_clock(model, tokens, 0.0), tokens)
    raw = FreezePredictor(replace(CONFIG, inputs="raw"))
    assert torch.equal(_hide_clock(raw, tokens, 0.3), tokens)


@pytest.mark.parametrize(
    ("scaling", "inputs"), [("none", "motion"), ("robust", "motion"), ("robust", "raw"), ("standard", "gain")]
)
def test_every_input_and_scaling_trains(make_windows, scaling, inputs):
    windows = make_windows(each=2)
    config, settings = replace(CONFIG, inputs=inputs), replace(QUICK, epochs=2, scaling=scaling, balance=True)
    fitted = fit_on(windows, windows, config, settings)
    assert all(math.isfinite(row["validation_loss"]) for row in fitted.history)
    assert bool((fitted.model.scaling.deviation == 1).all()) == (scaling == "none")


def test_robust_scaling_by_hand():
    tokens = torch.arange(101.0).reshape(1, 101, 1).expand(1, 101, 15).clone()
    tokens[..., 1] = 0
    model = FreezePredictor(CONFIG)
    fit_scaling(model, tokens, "robust")
    assert model.scaling.mean[0] == 50
    assert model.scaling.deviation[0] == pytest.approx(50 / 1.349)
    assert model.scaling.deviation[1] == 0
    assert model(tokens[:, :6]).isfinite().all()  # a feature that never changes divides by an epsilon


def test_baselines(make_windows):
    train, test = make_windows(each=3), make_windows(each=2, first=50)
    share = float(train.labels_N.double().mean())
    assert np.allclose(Majority(train).probability_N(test), share)
    labels = test.labels_N.numpy()
    by_clock = FromFeatures(train, "progress", "depth")
    clock, hand_made = (each.probability_N(test) for each in (by_clock, HandMade(train, 32)))
    assert 0.6 < auroc(labels, clock) < auroc(labels, hand_made)
    trees = Trees(train, 32).probability_N(test)
    assert auroc(labels, clock) < auroc(labels, trees)
    with threadpool_limits(2, user_api="openmp"):
        assert np.array_equal(Trees(train, 32).probability_N(test), trees)
    # The clock has progress and depth alone: other weights change nothing.
    still = WindowSet(tuple(replace(run, weights_TLK=run.weights_TLK * 0) for run in test.runs), test.window)
    assert np.array_equal(by_clock.probability_N(still), clock)


def test_a_classifier_on_one_feature_ranks_as_that_feature_does(make_windows):
    windows = make_windows(each=2)
    labels = windows.labels_N.numpy()
    _, features_NWF, _ = windows.batch(torch.arange(len(windows)))
    for name in ("progress", "depth"):
        values = windows.features_NF(name)[:, 0].numpy()
        assert np.array_equal(values, features_NWF[:, -1, FEATURES.index(name)].numpy())
        area = auroc(labels, values)
        assert auroc(labels, FromFeatures(windows, name).probability_N(windows)) == pytest.approx(max(area, 1 - area))
    both = windows.features_NF("log_lr", "progress").numpy()
    assert np.array_equal(both[:, 1:], windows.features_NF("progress").numpy())
    assert (np.diff(both[both[:, 1].argsort(kind="stable")], axis=0)[:, 0] <= 0).all()  # the rate only falls


def test_a_family_left_out_is_in_no_training(make_windows):
    windows = make_windows()
    result = fit(windows, SPEC, CONFIG, replace(QUICK, epochs=1), progress=False)
    spoilt = tuple(
        replace(run, labels_TL=~run.labels_TL) if run.family == "vit" and index not in result.split.test else run
        for index, run in enumerate(windows.runs)
    )
    one, other = (
        transfer(some, result.split, CONFIG, replace(QUICK, epochs=2)) for some in (windows, WindowSet(spoilt, 6))
    )
    assert one["families"]["vit"] == other["families"]["vit"]
    assert one["families"]["mlp"] != other["families"]["mlp"]
    assert set(one["families"]) == {"mlp", "vgg", "vit"}
    assert one["left_out"] == {}
    areas = [row["attention"]["auroc"] for row in one["families"].values()]
    assert one["mean"]["attention"]["auroc"] == pytest.approx(sum(areas) / 3)


def test_families_that_cannot_be_tested_say_why(make_windows):
    windows = make_windows(families=("mlp",), each=5)
    result = fit(windows, SPEC, CONFIG, replace(QUICK, epochs=1), progress=False)
    found = transfer(windows, result.split, CONFIG, QUICK)
    assert found["families"] == found["mean"] == {}
    assert found["left_out"] == {"mlp": "no training run is left: gather more runs"}


def test_a_family_of_one_class_has_no_ranking_and_stops_nothing(make_windows):
    windows = make_windows()
    frozen = relabelled(windows, True).runs
    runs = tuple(frozen[index] if run.family == "vit" else run for index, run in enumerate(windows.runs))
    windows = WindowSet(runs, 6)
    result = fit(windows, SPEC, CONFIG, replace(QUICK, epochs=1), progress=False)
    figures = figures_on_test_runs(windows, result, QUICK)["families"]["vit"]["attention"]
    assert figures["auroc"] is None
    assert figures["wrongly_frozen"] is None
    assert (
        transfer(windows, result.split, CONFIG, replace(QUICK, epochs=1))["families"]["vit"]["clock"]["auroc"] is None
    )


@pytest.mark.parametrize(("label", "words"), [(True, "freezable"), (False, "not yet freezable")])
def test_one_class_alone_is_refused(make_windows, label, words):
    with pytest.raises(UsageError, match=f"are labelled {words}: .* label threshold"):
        fit(relabelled(make_windows(each=2), label), SPEC, CONFIG, QUICK, progress=False)


def test_more_weights_than_recorded_are_refused(make_windows):
    with pytest.raises(UsageError, match="weights=64: only 32"):
        fit(make_windows(each=2), SPEC, replace(CONFIG, weights=64), QUICK, progress=False)


def test_weights_that_are_not_finite_are_refused(make_windows):
    windows = make_windows(each=2)
    for run in windows.runs:
        run.weights_TLK[3, 1, 5] = float("inf")
    with pytest.raises(UsageError, match=r"run run00[0-9]: some of its weights are not finite"):
        fit(windows, SPEC, CONFIG, QUICK, progress=False)


def test_a_training_that_diverges_says_so(make_windows):
    windows = make_windows(each=1)
    with pytest.raises(DivergedError, match="lower learning_rate"):
        fit_on(windows, windows, CONFIG, replace(QUICK, learning_rate=1e30))
    with pytest.raises(DivergedError, match="lower learning_rate"):
        fit_on(windows, windows, CONFIG, replace(QUICK, learning_rate=1e19, weight_decay=1e19))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"patience": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": 1e300},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
        {"weight_decay": 1e300},
        {"false_freeze": 1.0},
        {"hide_clock": 1.0},
        {"hide_clock": math.nan},
        {"validation": math.nan},
        {"test": 0.0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=re.escape(f"--{name.replace('_', '-')} {value}: give a ")):
        FitConfig(**wrong)


def test_an_unknown_device_is_refused_with_a_cure():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="`auto` takes what there is"):
        pick_device("abacus")

"""Going on from a predictor: with its weights and its scaling, and never to something worse."""

import copy
from dataclasses import replace

import pytest
import torch

from predictor.__main__ import main
from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.model.file import load_predictor, save_predictor
from predictor.model.first_prefix import PrefixModel
from predictor.model.sampling import SampleSpec
from predictor.training.card import show
from predictor.training.config import CONTINUED_LEARNING_RATE, FitConfig
from predictor.training.continued import continued
from predictor.training.fit import fit

SPEC = SampleSpec(weights=32, snapshots=23)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Plots take longer than all else."""
    for name in ("learning_curve", "calibration_curve", "families"):
        monkeypatch.setattr(f"predictor.training.plots.{name}", lambda *_: [])


def train(data, out, *flags):
    main(["train", "--data", str(data), "--out", str(out), "--epochs", "2", "--device", "cpu", "--no-transfer", *flags])


@pytest.fixture
def before(make_windows, tmp_path):
    """A predictor's file."""
    config = PredictorConfig(window=6, hidden=16, key=8, weights=32)
    settings = FitConfig(epochs=2, device="cpu", learning_rate=0.01)
    result = fit(make_windows(), SPEC, config, settings, progress=False)
    card = {"labels": {"tolerance": 0.5}, "data": {"runs": 15, "families": {"mlp": {}, "vit": {}}}}
    save_predictor(tmp_path / "before.safetensors", result.file(card))
    return tmp_path / "before.safetensors"


def test_it_keeps_widths_window_and_scaling_and_says_where_it_comes_from(before, write_trajectories, tmp_path, capsys):
    out = tmp_path / "after.safetensors"
    train(write_trajectories("own.h5", families=("mine",), first=50), out, "--continue-from", str(before))
    assert f"goes on from {before}" in capsys.readouterr().out
    old, new = load_predictor(before), load_predictor(out)
    assert new.model.config == old.model.config
    assert torch.equal(new.model.scaling.mean, old.model.scaling.mean)
    assert new.card["training"]["learning_rate"] == CONTINUED_LEARNING_RATE
    assert new.card["continued_from"]["name"] == str(before)
    assert new.card["continued_from"]["data"] == old.card["data"]
    assert "15 runs of mlp, vit" in show(new)


def test_it_keeps_what_is_known_of_prefixes_before_the_first_step(before, write_trajectories, tmp_path, capsys):
    old = load_predictor(before)
    known = PrefixModel(0.5, {"gradient": 1.0}, ((0.5, 1.0),), 88)
    save_predictor(before, replace(old, prefix=known, card={**old.card, "first_prefix": {"runs": 7, "replays": []}}))
    train(
        write_trajectories("own.h5", families=("mine",), first=50),
        tmp_path / "p.safetensors",
        "--continue-from",
        str(before),
    )
    new = load_predictor(tmp_path / "p.safetensors")
    assert new.prefix == known
    assert "learned from 7 runs" in show(new)


@pytest.mark.parametrize(("given", "rate"), [({}, CONTINUED_LEARNING_RATE), ({"--learning-rate"}, 0.03)])
def test_the_learning_rate_is_low_unless_it_is_given(before, given, rate):
    settings = FitConfig(continue_from=str(before), learning_rate=0.03)
    assert continued(PredictorConfig(), settings, given)[1].learning_rate == rate


def test_what_gets_no_better_stays_as_it_was(before, make_windows):
    """The labels are the opposite of the truth in what is trained on, and true in what chooses the epoch."""
    windows = make_windows()
    wrong = copy.deepcopy(windows)
    for run in wrong.runs:
        run.labels_TL.logical_not_()
    start = load_predictor(before)
    settings = FitConfig(epochs=3, device="cpu", learning_rate=0.01, continue_from=str(before))
    result = fit(windows, start.spec, start.model.config, settings, learn_from=wrong, progress=False)
    assert result.fitted.best_epoch == 0
    for ours, theirs in zip(result.fitted.model.parameters(), start.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("flag", ["--hidden=8", "--window=7", "--inputs=raw", "--scaling=none"])
def test_what_a_predictor_keeps_cannot_be_changed(before, flag):
    with pytest.raises(UsageError, match=flag.partition("=")[0]):
        continued(PredictorConfig(), FitConfig(continue_from=str(before)), {flag.partition("=")[0]})


def test_runs_of_another_sampling_are_refused(write_trajectories, tmp_path):
    with pytest.raises(UsageError, match=r"weights=32, snapshots=23.*weights=256, snapshots=60"):
        train(write_trajectories(), tmp_path / "p.safetensors", "--continue-from", "shipped")


def test_a_predictor_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(FileFault, match=r"none\.safetensors"):
        train(tmp_path / "none.h5", tmp_path / "p.safetensors", "--continue-from", str(tmp_path / "none.safetensors"))


def test_without_it_nothing_changes():
    config, settings = PredictorConfig(), FitConfig()
    assert continued(config, settings, set()) == (config, settings)

"""What is held out does not influence a predictor, and is what it is evaluated on at the end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.trajectories import open_trajectories, write_runs
from predictor.__main__ import main
from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.model.file import load_predictor, save_predictor
from predictor.model.sampling import SampleSpec
from predictor.shared.files import write_json
from predictor.training.card import show
from predictor.training.config import FitConfig
from predictor.training.dataset import WindowSet
from predictor.training.evaluation import CLASSIFIERS, Panel, panel_of, unseen
from predictor.training.fit import fit

QUICK = ["--epochs", "2", "--hidden", "16", "--key", "8", "--device", "cpu"]
KNOWN = {"digits"}


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Pictures are tested elsewhere, and here would take longer than all else."""
    for name in ("learning_curve", "calibration_curve", "families", "study"):
        monkeypatch.setattr(f"predictor.training.plots.{name}", lambda *_: [])


def poisoned(run):
    """The same run with other numbers wherever there are some: weights, learning rates and similarity."""
    draw = np.random.default_rng(run.config["seed"])
    return replace(
        run,
        weights_TLK=draw.normal(50, 30, run.weights_TLK.shape).astype("f4"),
        similarity_TL=draw.uniform(0.9, 1, run.similarity_TL.shape).astype("f4"),
        lr_T=draw.uniform(1, 2, run.lr_T.shape),
    )


def held(run):
    return run.config["family"] in ("resnet", "bert") or run.config["source"] not in KNOWN


@pytest.fixture
def three(write_trajectories, tmp_path):
    """Runs some of which are held out: as they are, with those poisoned, and without them."""
    files = [
        write_trajectories("a.h5", ("bert", "mlp", "resnet", "vgg", "vit"), each=3),
        write_trajectories("b.h5", ("mlp", "vit"), each=2, source="fashion-first", first=50),
        write_trajectories("c.h5", ("mlp",), each=2, source="fashion@14", first=60),
    ]
    runs = []
    for path in files:
        with open_trajectories(path) as file:
            runs += list(file)
    assert sum(map(held, runs)) == 12
    write_runs(tmp_path / "whole.h5", runs)
    write_runs(tmp_path / "poisoned.h5", [poisoned(run) if held(run) else run for run in runs])
    write_runs(tmp_path / "without.h5", [run for run in runs if not held(run)])
    return [tmp_path / f"{name}.h5" for name in ("whole", "poisoned", "without")]


def train(data, out, *flags):
    main(["train", "--data", str(data), "--out", str(out), *QUICK, *flags])
    return load_predictor(out)


def learned(file):
    """All of a predictor file that training, choosing and scaling decide, as comparable content."""
    tensors = {name: tensor.numpy().tobytes() for name, tensor in file.model.state_dict().items()}
    thresholds = {name: row["threshold"] for name, row in file.card["test"]["overall"].items()}
    card = {name: part for name, part in file.card.items() if name not in ("unseen", "provenance")}
    card["data"].pop("files")
    card["training"].pop("fit_seconds")
    return tensors, file.model.config, file.spec, file.threshold, thresholds, card


def test_no_number_of_a_held_out_run_reaches_the_predictor(three, tmp_path, capsys):
    flags = ["--learn-threshold", "0.99", "--no-transfer"]
    whole, other, without = (train(path, tmp_path / f"{path.stem}.safetensors", *flags) for path in three)
    assert learned(whole) == learned(other) == learned(without)
    assert whole.card["data"]["families"].keys() == {"mlp", "vgg", "vit"}
    assert whole.card["data"]["sources"] == {"digits": 9}
    assert whole.card["held_out"]["sources"] == ["fashion"]
    assert "resnet" in whole.card["held_out"]["families"]

    found = whole.card["unseen"]
    kinds = [(row["family"], row["source"], row["runs"]) for row in found["groups"]]
    assert kinds == [
        ("bert", "digits", 3),
        ("mlp", "fashion-first", 2),
        ("mlp", "fashion@14", 2),
        ("resnet", "digits", 3),
        ("vit", "fashion-first", 2),
    ]
    assert found["runs"] == 12
    assert found != other.card["unseen"]
    for name, row in found["overall"].items():
        assert row["threshold"] == whole.card["test"]["overall"][name]["threshold"]
    assert without.card["unseen"] == {"runs": 0}

    printed = capsys.readouterr().out
    assert "held out: families resnet, mobilenet, texttransformer, efficientnet-lite, bert; sources fashion" in printed
    assert "12 runs in 5 groups" in printed
    assert "There was no run of them" in printed
    for title in ("AUROC", "AP not ready", "calibration error", "found", "false freezes", "false freezes at half"):
        assert any(line.startswith(f"{title} ") for line in printed.splitlines()), title
    assert "mlp on fashion@14" in printed
    assert max(map(len, show(whole).split("Held-out runs")[1].splitlines())) <= 120


def test_tune_never_sees_a_held_out_run(three, tmp_path):
    best = []
    for path in three[1:]:
        folder = tmp_path / path.stem
        main(["tune", "--data", str(path), "--out", str(folder), "--trials", "1", "--folds", "2", "--epochs", "1"])
        best.append(json.loads((folder / "best.json").read_text()))
    assert best[0] == best[1]
    assert best[0]["chosen_on"] == {"families": ["mlp", "vgg", "vit"], "sources": ["digits"]}


def test_a_split_of_ones_own(three, tmp_path):
    (tmp_path / "own.toml").write_text('families = ["vit"]\n')
    file = train(three[0], tmp_path / "p.safetensors", "--held-out", str(tmp_path / "own.toml"), "--no-transfer")
    assert file.card["held_out"] == {"families": ["vit"], "sources": []}
    assert set(file.card["data"]["families"]) == {"bert", "mlp", "resnet", "vgg"}
    assert [(row["family"], row["source"]) for row in file.card["unseen"]["groups"]] == [
        ("vit", "digits"),
        ("vit", "fashion-first"),
    ]


def test_a_predictor_without_evaluation_says_so(three, tmp_path, capsys):
    file = train(three[0], tmp_path / "p.safetensors", "--held-out", "none", "--no-transfer")
    assert file.card["held_out"] == {"families": [], "sources": []}
    assert file.card["data"]["runs"] == 21
    assert file.card["unseen"] == {"runs": 0}
    words = "This predictor is for use and not for evaluation"
    assert capsys.readouterr().out.count(words) == 2  # before the training, and among its figures
    assert f"held out    nothing. {words}" in show(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read .No such file"),
        ("families = [", "no TOML"),
        ('families = "resnet"\n', "families = 'resnet' is no list of names"),
        ("sources = [3]\n", r"sources = \[3\] is no list of names"),
        ('family = ["resnet"]\n', "family means nothing here, only families and sources do"),
        ("families = []\n", "names no family and no source"),
        ("", "names no family and no source: .*`none` to hold nothing out"),
        (b"\xff\xfe", "no TOML"),
        ("families = " + "[" * 3000, "no TOML"),
    ],
)
def test_a_split_file_that_would_hold_nothing_out_is_refused(tmp_path, content, words):
    path = tmp_path / "own.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in ("train", "tune"):
        with pytest.raises(FileFault, match=words):
            main([command, "--data", str(tmp_path / "none.h5"), "--held-out", str(path)])


def test_settings_that_were_chosen_on_what_is_held_out_are_refused(three, tmp_path):
    path = tmp_path / "best.json"
    settings = {"window": 5}
    write_json(path, {"settings": settings, "chosen_on": {"families": ["mlp", "resnet"], "sources": ["fashion-last"]}})
    with pytest.raises(UsageError, match=r"best\.json: .*on resnet, fashion-last, which are held out: tune again"):
        train(three[0], tmp_path / "p.safetensors", "--settings", str(path))
    for more in ({}, {"chosen_on": 3}, {"chosen_on": {"families": [], "sources": [3]}}):
        write_json(path, {"settings": settings, **more})
        with pytest.raises(UsageError, match="does not say what its settings were chosen on"):
            train(three[0], tmp_path / "p.safetensors", "--settings", str(path))
    file = train(three[0], tmp_path / "p.safetensors", "--settings", str(path), "--held-out", "none", "--no-transfer")
    assert file.model.config.window == 5


def test_nothing_left_to_learn_from_is_a_clear_error(write_trajectories, tmp_path):
    with pytest.raises(UsageError, match=r"that is not held out .*--held-out"):
        train(write_trajectories(families=("resnet",)), tmp_path / "p.safetensors")


class _Fixed:
    """A classifier with given probabilities."""

    def __init__(self, probability_N):
        self._probability_N = np.array(probability_N)

    def probability_N(self, windows):
        return self._probability_N


def test_groups_are_those_of_family_and_source_and_the_mean_is_theirs(make_windows):
    one, two, three = make_windows(families=("mlp", "vit", "mlp"), each=1, snapshots=13, layers=1, window=6).runs
    assert (one.family, two.family, three.family) == ("mlp", "vit", "mlp")
    # Eight windows a run, four of them freezable.
    labels_TL = (torch.arange(13) >= 9)[:, None]
    runs = (replace(one, labels_TL=labels_TL), replace(two, labels_TL=labels_TL), replace(three, labels_TL=labels_TL))
    rising, falling = np.linspace(0.1, 0.8, 8), np.linspace(0.8, 0.1, 8)
    panel = Panel({"attention": _Fixed([*rising, *falling, *falling])}, {"attention": 0.45})
    found = unseen(panel, WindowSet((runs[0], runs[1], replace(runs[2], source="fashion")), 6))
    areas = {(row["family"], row["source"]): row["judges"]["attention"]["auroc"] for row in found["groups"]}
    assert areas == {("mlp", "digits"): 1.0, ("mlp", "fashion"): 0.0, ("vit", "digits"): 0.0}
    assert found["mean"]["attention"]["auroc"] == pytest.approx(1 / 3)
    assert found["overall"]["attention"]["windows"] == 24
    wrong = [row["judges"]["attention"]["false_freezes_at_half"] for row in found["groups"]]
    assert wrong == [0.0, pytest.approx(4 / 6), pytest.approx(4 / 6)]
    assert unseen(panel, WindowSet((), 6)) == {"runs": 0}


def test_baselines_are_trained_on_the_training_runs_and_choose_by_the_validation_runs(make_windows):
    windows = make_windows(each=3)
    config, settings = PredictorConfig(window=6, weights=32, hidden=16, key=8), FitConfig(epochs=1, device="cpu")
    result = fit(windows, SampleSpec(weights=32, snapshots=23), config, settings, progress=False)
    spoilt = list(windows.runs)
    for run in result.split.test:
        spoilt[run] = replace(spoilt[run], labels_TL=~spoilt[run].labels_TL)
    panels = [panel_of(some, result, settings) for some in (windows, WindowSet(tuple(spoilt), 6))]
    assert panels[0].thresholds == panels[1].thresholds
    assert panels[0].thresholds["attention"] == result.threshold
    assert list(panels[0].classifiers) == list(CLASSIFIERS)
    for name, one in panels[0].classifiers.items():
        assert np.array_equal(one.probability_N(windows), panels[1].classifiers[name].probability_N(windows)), name


def test_a_card_from_before_there_was_such_a_split_shows(make_predictor_file):
    figures = {"windows": 100, "freezable": 0.7, "auroc": 0.9}
    overall = dict.fromkeys(("majority", "clock", "hand-made", "attention"), figures)
    path = make_predictor_file()
    card = {"test": {"overall": overall, "families": {"mlp": overall}, "calibration": []}, "data": {"runs": 43}}
    save_predictor(path, replace(load_predictor(path), card=card))
    text = show(load_predictor(path))
    assert "Held-out runs, of families it knows: 100 windows, 70.0 % freezable" in text
    assert "Held out" not in text.replace("Held-out", "")
    assert "held out    " not in text
    assert "trees" not in text

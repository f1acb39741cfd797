"""`python -m predictor`: from trajectories to a predictor file, and the text about one."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from data.outcomes.records import write_outcomes
from data.trajectories.labels import LabelRule
from predictor.__main__ import _parser, main
from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.model.file import load_predictor, save_predictor
from predictor.model.sampling import SampleSpec
from predictor.shared.files import read_json_lines, write_json
from predictor.training.card import show, table
from predictor.training.config import FitConfig
from predictor.training.evaluation import CLASSIFIERS

CHECKOUT = Path(__file__).parents[3]
QUICK = ["--epochs", "3", "--hidden", "16", "--key", "8", "--device", "cpu", "--learning-rate", "0.01"]


@pytest.fixture
def drawn():
    """For the tests that look at the plots."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Plots take longer than all else."""
    if "drawn" not in request.fixturenames:
        for name in ("learning_curve", "calibration_curve", "families", "study"):
            monkeypatch.setattr(f"predictor.training.plots.{name}", lambda *_: [])


def train(data, out, *flags):
    main(["train", "--data", str(data), "--out", str(out), *QUICK, *flags])


@pytest.mark.usefixtures("drawn")
def test_train_writes_a_predictor_with_its_figures_and_show_prints_them(write_trajectories, tmp_path, capsys):
    out = tmp_path / "runs" / "predictor.safetensors"
    train(write_trajectories(), out)
    printed = capsys.readouterr().out
    assert "15 finished runs of 3 families (mlp, vgg, vit)" in printed
    assert "weights: 256 asked for, 32 recorded" in printed
    assert "Families never seen" in printed
    for name in ("metrics.jsonl", "metrics.json", "learning_curve.png", "calibration.png", "families.png"):
        assert (out.with_suffix("") / name).stat().st_size > 100, name

    file = load_predictor(out)
    assert file.spec == SampleSpec(weights=32, snapshots=23)
    assert file.model.config.weights == 32
    assert file.card["labels"] == {"label_threshold": 0.98, "label_dip": 0.0, "learn_threshold": None}
    assert file.card["data"]["families"]["vit"] == {"train": 3, "validation": 1, "test": 1}
    kept = json.loads((out.with_suffix("") / "metrics.json").read_text())
    assert set(kept["transfer"]["families"]) == {"mlp", "vgg", "vit"}
    assert len({run for part in kept["split"].values() for run in part}) == 15
    assert file.threshold == kept["test"]["overall"]["attention"]["threshold"]
    last = read_json_lines(out.with_suffix("") / "metrics.jsonl")[-1]
    assert last["test_windows"] == kept["test"]["overall"]["attention"]["windows"]

    main(["show", str(out)])
    shown = capsys.readouterr().out
    assert "motion, gain and clock: the last 10 snapshots of 32 weights" in shown
    assert "32 weights a layer, 23 snapshots a training, seed 0" in shown
    assert "CKA to the final network stays at least 0.98" in shown
    assert f"freezes from probability {file.threshold:.4f}" in shown
    assert "mlp 3, vgg 3, vit 3" in shown
    tables = printed[printed.index("Held-out runs") : printed.index("epoch")].strip()
    assert tables in shown
    assert max(map(len, tables.splitlines())) <= 120


def test_the_same_seed_gives_the_same_figures_whatever_the_order_of_files(write_trajectories, tmp_path):
    one, other = write_trajectories("one.h5", each=3), write_trajectories("other.h5", each=3)
    figures = []
    for number, data in enumerate((one, other)):
        train(data, tmp_path / f"{number}.safetensors", "--no-transfer")
        kept = json.loads((tmp_path / f"{number}" / "metrics.json").read_text())
        assert "transfer" not in kept
        figures.append((kept["test"], kept["history"], kept["split"]))
    assert figures[0] == figures[1]


def test_settings_of_a_file_count_unless_a_flag_says_otherwise(write_trajectories, tmp_path):
    settings = {"window": 5, "hidden": 24, "balance": True, "scaling": "robust", "learn_threshold": 0.99, "key": 4}
    chosen_on = {"families": ["mlp"], "sources": ["digits"]}
    write_json(tmp_path / "best.json", {"settings": settings, "score": 0.9, "chosen_on": chosen_on})
    out = tmp_path / "p.safetensors"
    train(write_trajectories(each=2), out, "--no-transfer", "--settings", str(tmp_path / "best.json"))
    file = load_predictor(out)
    assert (file.model.config.window, file.model.config.hidden, file.model.config.key) == (5, 16, 8)
    assert file.card["training"]["balance"] is True
    assert file.card["training"]["scaling"] == "robust"
    assert file.card["labels"]["learn_threshold"] == 0.99


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no settings"),
        ("[]", "no settings"),
        ("[" * 100_000, "no settings"),
        ('{"settings": 3}', "no settings"),
        ('{"settings": {"out": "/tmp/x"}}', "no settings of a predictor: out"),
        (None, "No such file"),
    ],
)
def test_a_settings_file_that_is_none_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "best.json").write_text(content)
    with pytest.raises(FileFault, match=words):
        main(["train", "--settings", str(tmp_path / "best.json")])


def test_settings_of_the_wrong_kind_are_refused_like_flags(tmp_path, capsys):
    write_json(tmp_path / "best.json", {"settings": {"window": "wide"}})
    with pytest.raises(SystemExit):
        main(["train", "--settings", str(tmp_path / "best.json")])
    assert "--window: invalid int value" in capsys.readouterr().err


def test_settings_found_on_outcomes_are_used_with_outcomes(write_trajectories, tmp_path, capsys):
    data, study, outcomes = write_trajectories(each=3), tmp_path / "study", tmp_path / "outcomes.jsonl"
    write_outcomes(outcomes, outcomes_of(data))
    flags = ["--data", str(data), "--outcomes", str(outcomes), "--tolerance", "0.25", "--epochs", "1"]
    main(["tune", *flags, "--out", str(study), "--trials", "2", "--folds", "2"])
    assert f"next: python -m predictor train --settings {study / 'best.json'} --data {data} --outcomes {outcomes}" in (
        capsys.readouterr().out
    )
    settings = json.loads((study / "best.json").read_text())["settings"]
    assert (settings["tolerance"], settings["learn_threshold"]) == (0.25, None)
    out = tmp_path / "predictor.safetensors"
    train(data, out, "--no-transfer", "--outcomes", str(outcomes), "--settings", str(study / "best.json"))
    file = load_predictor(out)
    assert file.card["labels"] == {"tolerance": 0.25}
    assert (file.model.config.window, file.model.config.dropout) == (settings["window"], settings["dropout"])


def test_the_label_flags_have_the_rules_defaults():
    for command in ("train", "tune"):
        flags = _parser().parse_args([command])
        assert LabelRule(flags.label_threshold, flags.label_dip) == LabelRule()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window", "99"], "99 snapshots"),
        (["--window", "2"], "at least 3 snapshots"),
        (["--label-threshold", "1.5"], "threshold=1.5"),
        (["--validation", "0.9"], "shares above 0"),
        (["--validation", "nan"], "--validation nan: give a share above 0 and below 1"),
        (["--learning-rate", "nan"], "--learning-rate nan: give a number above 0"),
        (["--learning-rate", "1e30"], "lower learning_rate"),
        (["--label-threshold", "0.5"], "are labelled freezable"),
    ],
)
def test_what_cannot_work_is_a_clear_error(write_trajectories, tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        train(write_trajectories(each=2), tmp_path / "p.safetensors", *flags)
    assert not (tmp_path / "p.safetensors").exists()


def test_the_output_is_named_as_a_file(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        train(tmp_path / "none.h5", tmp_path / "predictor")


def test_too_few_runs_say_how_to_get_more(write_trajectories, tmp_path):
    with pytest.raises(UsageError, match="collect gather trajectories"):
        train(write_trajectories(families=("mlp",), each=2), tmp_path / "p.safetensors")


def test_a_single_family_has_no_transfer_and_says_so(write_trajectories, tmp_path, capsys):
    train(write_trajectories(families=("mlp",), each=4), tmp_path / "p.safetensors")
    assert "mlp: no training run is left" in capsys.readouterr().out


def test_data_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(FileFault, match=r"none\.h5"):
        main(["train", "--data", str(tmp_path / "none.h5")])


def test_a_path_that_cannot_be_written_is_found_before_the_training(write_trajectories, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFault, match="cannot be written"):
        train(write_trajectories(each=2), tmp_path / "file" / "p.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": 1}        '])
def test_show_refuses_what_is_no_predictor(tmp_path, content):
    path = tmp_path / "p.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFault, match=r"p\.safetensors"):
        main(["show", str(path)])


HOSTILE = [
    {},
    [],
    "text",
    {"test": {"overall": 3, "families": [1]}, "transfer": "x", "data": None, "labels": [2]},
    {"test": {"overall": {"attention": {"auroc": "high", "windows": True, "brier": 10**400, "found": None}}}},
    {"transfer": {"families": {"mlp": None}, "mean": 4, "left_out": {"vit": {"a": 1}}}},
    {"labels": {"\x1b[2J\n\x07clear": "\x1b]0;title\x07"}, "data": {"runs": 1e999, "sources": {"x" * 9999: 1}}},
    {"test": {"families": {str(number): {} for number in range(10_000)}}},
    {"held_out": 3, "unseen": {"overall": {}, "groups": []}},
    {"held_out": {"families": 3, "sources": ["\x1b[2J", None, {}]}, "unseen": {"overall": 7}},
    {"held_out": {"sources": ["s" * 999] * 999}, "unseen": {"overall": {"trees": 3}, "groups": [{}] * 9999, "mean": 1}},
    {
        "held_out": {"sources": ["s"]},
        "unseen": {"overall": dict.fromkeys(CLASSIFIERS), "groups": [{"family": "f" * 99}] * 99},
    },
]


@pytest.mark.parametrize("card", HOSTILE, ids=range(len(HOSTILE)))
def test_show_survives_any_card(make_predictor_file, card):
    path = make_predictor_file()
    save_predictor(path, replace(load_predictor(path), card=card))
    text = show(load_predictor(path))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert len(text) < 40_000
    assert "n/a" in text


def test_a_table_is_as_wide_as_it_must_be():
    rows = [["one", "1.5", "n/a"], ["eleven", "10.25", "3"]]
    assert table(["", "false\nfreezes", "x"], rows).splitlines() == [
        "          false",
        "        freezes    x",
        "one         1.5  n/a",
        "eleven    10.25    3",
    ]


@pytest.mark.parametrize("command", ["train", "tune", "show"])
def test_help_answers_without_importing_anything_heavy(command):
    code = (
        "import sys\nfrom predictor.__main__ import main\ntry:\n    main([sys.argv[1], '--help'])\nfinally:\n"
        "    assert not {'torch', 'numpy', 'optuna', 'wandb', 'sklearn', 'matplotlib', 'h5py'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_in_the_installed_library_it_says_where_it_runs(tmp_path):
    """The wheel has no `predictor.training`."""
    shutil.copytree(CHECKOUT / "predictor", tmp_path / "predictor", ignore=shutil.ignore_patterns("training"))
    command = [sys.executable, "-S", "-m", "predictor", "train"]  # -S: without the checkout's editable install
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "checkout" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_setting_is_a_flag_of_train():
    given = vars(_parser().parse_args(["train"]))
    assert {field.name for kind in (PredictorConfig, FitConfig) for field in fields(kind)} <= set(given)


def outcomes_of(path, steps=(0, 8, 16), sizes=(1, 2, 4)):
    """Outcomes of the trajectories of a file: freezing costs less the later and the smaller the prefix."""
    from data.dataset.windows import trajectories_in
    from data.outcomes.records import Outcome, Result

    unfrozen = Result("finished", 0.1, 0.9, 0.1)
    rows = []
    for run in trajectories_in(path):
        config, names = run.config, run.layer_names
        total, fixed = config["total_steps"], {"seed": 0, "order_seed": 0, "unfrozen": unfrozen}
        parts = {"run_id": run.run_id, "workload": "w", "family": config["family"], "source": config["source"]}
        for step in steps:
            for count in sizes:
                cost = 0.04 * count * (1 - step / total) ** 2
                result = Result("finished", 0.1 + cost, 0.9 - 0.3 * cost, 0.1)
                layers, share = tuple(range(count)), 1 - count / (1.5 * len(names))
                rows.append(
                    Outcome(
                        **parts,
                        **fixed,
                        kind="front",
                        step=step,
                        total_steps=total,
                        layers=layers,
                        layer_names=tuple(names[:count]),
                        layer_count=len(names),
                        flops_share=share,
                        result=result,
                    )
                )
    return rows


def test_train_on_outcomes_knows_thresholds_by_risk(write_trajectories, tmp_path, capsys):
    data, out, outcomes = write_trajectories(), tmp_path / "predictor.safetensors", tmp_path / "outcomes.jsonl"
    found, others = outcomes_of(data), tmp_path / "others.jsonl"
    half = len(found) // 2
    write_outcomes(outcomes, found[:half])
    write_outcomes(others, found[half:])
    train(data, out, "--no-transfer", "--outcomes", str(outcomes), str(others), "--tolerance", "0.25")
    printed = capsys.readouterr().out
    assert "What the runs would have lost and saved" in printed
    assert "without those of test runs: logits times " in printed
    file = load_predictor(out)
    assert [risk for risk, _ in file.risks] == [0.1, 0.25, 0.5, 1.0, 2.0]
    assert file.threshold == pytest.approx(file.threshold_for(0.5))
    assert sorted((cut for _, cut in file.risks), reverse=True) == [cut for _, cut in file.risks]
    assert "costs at most 0.25 pp of accuracy" in show(file)
    assert f"freezes from probability {file.threshold:.4f}, for a risk of 0.5 pp" in show(file)
    with pytest.raises(UsageError, match="comes twice"):
        train(data, out, "--outcomes", str(outcomes), str(outcomes))
    with pytest.raises(UsageError, match="--learn-threshold is for labels from CKA"):
        train(data, out, "--outcomes", str(outcomes), "--learn-threshold", "0.99")
    with pytest.raises(UsageError, match=r"tolerance=0\.0"):
        train(data, out, "--outcomes", str(outcomes), "--tolerance", "0")

"""Figures are kept whatever wandb does."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from predictor.errors import FileFault, UsageError
from predictor.shared.files import read_json_lines
from predictor.shared.tracking import start_tracker

CHECKOUT = Path(__file__).parents[3]


class FakeRun:
    def __init__(self, fails=False):
        self.fails = fails
        self.rows = []
        self.finished = 0

    def log(self, row, step):
        if self.fails:
            raise ConnectionError("the server is gone")
        self.rows.append((row, step))

    def finish(self):
        self.finished += 1


def fake_wandb(monkeypatch, init):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))


def test_off_keeps_figures_in_a_file_and_imports_no_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    with start_tracker("train", "off", tmp_path, {"epochs": 3}) as tracker:
        tracker.log({"loss": 0.5, "note": "x"}, 1)
        tracker.log({"loss": float("nan"), "auroc": None}, 2)
    head, *rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert head["program"] == "train"
    assert head["config"] == {"epochs": 3}
    assert rows == [{"loss": 0.5, "note": "x", "step": 1}, {"auroc": None, "loss": None, "step": 2}]


def test_a_second_start_appends(tmp_path):
    for step in (1, 2):
        with start_tracker("train", "off", tmp_path, {}) as tracker:
            tracker.log({"loss": 1.0}, step)
    assert [row.get("step") for row in read_json_lines(tmp_path / "metrics.jsonl")] == [None, 1, None, 2]


def test_figures_also_go_to_wandb(tmp_path, monkeypatch):
    run, asked = FakeRun(), {}
    fake_wandb(monkeypatch, lambda **settings: asked.update(settings) or run)
    with start_tracker("tune", "offline", tmp_path, {"trials": 2, "suite": "quick"}) as tracker:
        tracker.log({"score": 0.9}, 4)
    assert run.rows == [({"score": 0.9}, 4)]
    assert run.finished == 1
    assert (asked["mode"], asked["dir"], asked["group"]) == ("offline", str(tmp_path), "quick")
    assert asked["config"] == {"trials": 2, "suite": "quick"}


@pytest.mark.parametrize("cause", ["missing", "init", "log", "finish"])
def test_a_failing_wandb_stops_nothing(tmp_path, monkeypatch, capsys, cause):
    run = FakeRun(fails=cause == "log")
    if cause == "finish":
        run.finish = lambda: 1 / 0

    def init(**settings):
        if cause == "init":
            raise RuntimeError("no API key")
        return run

    fake_wandb(monkeypatch, init)
    if cause == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    with start_tracker("train", "online", tmp_path, {}) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 0.5}, 2)
    assert [row.get("loss") for row in read_json_lines(tmp_path / "metrics.jsonl")] == [None, 1.0, 0.5]
    assert capsys.readouterr().err.count("going on without it") == 1


def test_a_mode_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose one of off, offline, online"):
        start_tracker("train", "on", tmp_path, {})


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFault, match="choose another place"):
        start_tracker("train", "off", tmp_path / "file", {})


def test_a_real_offline_run_leaves_its_files(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from predictor.shared.tracking import start_tracker\n"
        "with start_tracker('train', 'offline', Path(sys.argv[1]), {'a': 1}) as tracker:\n"
        "    tracker.log({'loss': 1.0}, 1)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "going on without it" not in done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))

"""The command line of data: what is printed, and the exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main
from data.trajectories import open_trajectories, write_runs
from predictor.errors import UsageError
from tests.data.made import made_trajectory, write_changed

CHECKOUT = Path(__file__).parents[2]


def run(*arguments, cwd=CHECKOUT):
    command = [sys.executable, "-m", "data", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_inspect(tmp_path, capsys):
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    assert main(["inspect", str(tmp_path / "t.h5"), "--threshold", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "1 runs" in out
    assert "at least 0.5" in out
    assert not err


def test_inspect_and_validate_look_where_gather_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_runs(Path("runs/trajectories.h5"), [made_trajectory()])
    assert main(["inspect"]) == 0
    assert main(["validate"]) == 0
    assert "runs/trajectories.h5: sound" in capsys.readouterr().out


def test_validate_names_every_fault_and_sets_the_exit_status(tmp_path, capsys):
    write_runs(tmp_path / "good.h5", [made_trajectory()])

    def change(group):
        del group["lr"], group["loss"]

    bad = write_changed(tmp_path / "bad.h5", change)
    assert main(["validate", str(tmp_path / "good.h5")]) == 0
    assert main(["validate", str(tmp_path / "good.h5"), str(bad), str(tmp_path / "none.h5")]) == 1
    out = capsys.readouterr().out
    assert f"{bad}: run mlp-1: field lr: missing" in out
    assert f"{bad}: run mlp-1: field loss: missing" in out
    assert f"{bad}: faults: 2" in out
    assert "none.h5: there is no such file" in out
    assert f"{tmp_path / 'good.h5'}: sound" in out


def test_merge(tmp_path, capsys):
    for name in ("a", "b"):
        write_runs(tmp_path / f"{name}.h5", [made_trajectory(name)])
    paths = [str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]
    assert main(["merge", *paths, "--out", str(tmp_path / "all.h5")]) == 0
    assert "2 runs from 2 files" in capsys.readouterr().out
    with pytest.raises(UsageError, match="run a"):
        main(["merge", *paths, paths[0], "--out", str(tmp_path / "all.h5")])
    assert main(["merge", *paths, paths[0], "--out", str(tmp_path / "all.h5"), "--on-duplicate", "skip"]) == 0
    with open_trajectories(tmp_path / "all.h5") as file:
        assert file.run_ids == ("a", "b")


def test_prepare_says_what_prepare_says(monkeypatch):
    monkeypatch.setattr("data.prepare.prepare", lambda install: 8 if install else 7)
    assert main(["prepare"]) == 7
    assert main(["prepare", "--install"]) == 8


def test_errors_come_without_a_traceback(tmp_path):
    ended = run("inspect", tmp_path / "none.h5")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}/none.h5: there is no such file: make it with")
    assert "Traceback" not in ended.stderr
    assert not ended.stdout


def test_help_imports_nothing_heavy():
    heavy = {"h5py", "numpy", "pydantic", "tabulate", "torch", "tqdm"}
    script = f"import sys, data.__main__; print(sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"

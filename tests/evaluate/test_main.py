"""The command line: help at once, a whole suite with lost trials in it, and errors before any training."""

import json
import subprocess
import sys

import pytest

from evaluate.__main__ import main
from predictor.errors import FileFault, UsageError

SUITE = """
name = "mixed"
seeds = [0]
policies = ["none", "static"]
recipe = { train_samples = 100, epochs = 2 }
[[workloads]]
name = "mlp-digits"
[[workloads]]
name = "mlp-digits"
label = "diverges"
recipe = { lr = 1e30 }
[[workloads]]
name = "tests.evaluate.toys:broken"
label = "broken"
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "mixed.toml"
    path.write_text(SUITE)
    return str(path)


def test_help_imports_nothing_heavy():
    code = "import sys, evaluate.__main__; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_lost_trials_lose_nothing_else(suite, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["run-suite", "--suite", suite, "--out", str(out), "--device", "cpu", "--slots", "1"]
    assert main(command) == 1
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    order = [("mlp-digits", "finished"), ("diverges", "diverged"), ("broken", "failed")]
    assert [(row["workload"], row["status"]) for row in rows] == [pair for pair in order for _ in range(2)]
    assert "FAILED broken, static, seed 0: RuntimeError: this model is broken; its log: " in said
    assert f"report: {out.resolve() / 'report.html'}" in said
    assert "cost: wall-clock time" in said
    assert "Traceback" in (out / "logs" / f"{rows[-1]['trial_id']}.log").read_text()
    assert (out / "report.html").exists()
    assert main([*command, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "6 trials (workloads: 3, policies: 2, seeds: 1); 2 to run, 1 at a time" in listed
    assert listed.count("done    ") == 4
    assert listed.count("to run  ") == 2
    assert main(["report", str(out), "--cost", "flops", "--against", "static"]) is None
    said = capsys.readouterr().out
    assert all(text in said for text in ("report:", "by FLOPs", "to static"))
    assert "Difference to static" in (out / "report.html").read_text()
    elsewhere = ["run-suite", "--suite", suite, "--out", str(tmp_path / "more"), "--adopt", str(out / "results.jsonl")]
    assert main([*elsewhere, "--device", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "adopted: 4 trials" in said
    assert "cost: FLOPs;" in said
    assert not (tmp_path / "more").exists()


def test_a_dry_run_writes_nothing(suite, tmp_path, capsys):
    assert main(["run-suite", "--suite", suite, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "mlp-digits, static, seed 0" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_told_before_any_training(suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileFault, match="--out"):
        main(["run-suite", "--suite", suite, "--out", str(tmp_path / "file" / "out"), "--device", "cpu"])
    with pytest.raises(UsageError, match="there is no suite 'quik'"):
        main(["run-suite", "--suite", "quik"])
    with pytest.raises(UsageError, match="device"):
        main(["run-suite", "--suite", suite, "--device", "tpu"])
    with pytest.raises(UsageError, match="slots=0"):
        main(["run-suite", "--suite", suite, "--slots", "0"])
    with pytest.raises(FileFault, match=r"gone\.safetensors"):
        main(["run-suite", "--suite", "quick", "--predictor", "gone.safetensors"])
    with pytest.raises(FileFault, match=r"suite\.json"):
        main(["report", str(tmp_path)])
    with pytest.raises(UsageError, match="--oracles gone: there is no such folder"):
        main(["report", str(tmp_path), "--oracles", "gone"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mixed.toml"]

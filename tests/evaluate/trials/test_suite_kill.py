"""run-suite killed at several moments: the same command goes on, and ends with the results of an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluate.__main__ import main
from predictor.shared.files import read_json_lines

ROOT = Path(__file__).parents[3]
SUITE = """
name = "tiny"
seeds = [0, 1]
workloads = ["mlp-digits"]
policies = ["none", { name = "linear", options = { start = 0.2 } }, "smartfrz"]
recipe = { train_samples = 1000, epochs = 12 }
"""
TIMES = {"train_seconds", "cpu_seconds", "seconds", "policy_seconds", "started", "peak_memory_bytes"}
"""What two runs of the same trial may differ in."""


def kill_when(arguments, ready):
    """Start run-suite, and SIGKILL it alone, as soon as `ready` says so."""
    command = [sys.executable, "-m", "evaluate", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def results(out):
    return sorted(map(without_times, read_json_lines(out / "results.jsonl")), key=lambda row: row["trial_id"])


def lines(out):
    path = out / "results.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_several_moments_it_ends_as_if_unbroken(tmp_path, make_predictor_file):
    predictor = make_predictor_file(0.9)
    (tmp_path / "tiny.toml").write_text(SUITE)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--suite", str(tmp_path / "tiny.toml"), "--predictor", str(predictor), "--slots", "2", "--device", "cpu"]
    assert main(["run-suite", *options, "--out", str(whole)]) == 0

    command = ["run-suite", *options, "--out", str(broken)]
    kill_when(command, lambda: any(broken.glob("logs/*.log")))  # in the first trials
    assert lines(broken) == 0
    kill_when(command, lambda: lines(broken) >= 1)  # between trials
    kept = lines(broken)
    kill_when(command, lambda: lines(broken) >= kept + 1)
    content = (broken / "results.jsonl").read_bytes()
    (broken / "results.jsonl").write_bytes(content[: -len(content) // 50])  # and in the middle of writing a line
    assert main(command) == 0

    assert len(results(whole)) == 6
    assert results(broken) == results(whole)
    frozen = {row["policy"]: row["freezes"] for row in results(whole)}
    assert frozen["none"] == []
    assert frozen["linear"]
    assert frozen["smartfrz"]

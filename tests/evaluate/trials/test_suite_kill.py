"""run-suite killed in the middle of trials: the same command goes on, and ends with the results of an unbroken run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evaluate.trials.folder import SuiteFolder
from evaluate.trials.plan import Settings, make_plan
from evaluate.trials.run import run_suite
from evaluate.trials.suite import read_suite
from predictor.shared.files import read_json_lines
from tests.processes import wait_for

ROOT = Path(__file__).parents[3]
SUITE = """
name = "tiny"
seeds = [0]
workloads = ["mlp-digits"]
policies = ["none", { name = "linear", options = { start = 0.2 } }, "static"]
recipe = { train_samples = 200, epochs = 5 }
"""
TIMES = {"train_seconds", "cpu_seconds", "seconds", "policy_seconds", "started", "peak_memory_bytes"}
"""What two runs of the same trial may differ in."""


def kill_when(arguments, ready):
    """Start run-suite, and SIGKILL it alone, as soon as `ready` says so."""
    command = [sys.executable, "-m", "evaluate", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    wait_for(ready, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def results(folder):
    return sorted(map(without_times, read_json_lines(folder.results)), key=lambda row: row["trial_id"])


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_it_ends_as_if_unbroken(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE)
    whole, broken = SuiteFolder(tmp_path / "whole"), SuiteFolder(tmp_path / "broken")
    plan = make_plan(read_suite(str(path)), Settings("cpu", 2))
    run_suite(plan, whole, lambda figures, done: None)

    command = ["run-suite", "--suite", str(path), "--slots", "2", "--device", "cpu", "--out", str(broken.root)]
    kill_when(command, lambda: broken.results.exists() and broken.results.read_bytes().count(b"\n") >= 1)
    content = broken.results.read_bytes()
    broken.results.write_bytes(content + content[:100])  # as if in the middle of writing a line
    assert run_suite(plan, broken, lambda figures, done: None).failed == {}

    assert len(results(whole)) == 3
    assert results(broken) == results(whole)
    assert {row["policy"]: bool(row["freezes"]) for row in results(whole)}["linear"]

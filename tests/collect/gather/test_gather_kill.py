"""Gather is killed at several moments; what is there at the end equals what an unbroken gather leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from collect import __main__ as program
from collect.gather import trajectories as gathering
from data.trajectories.folder import GatherFolder
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from tests.collect.inline import run_inline

CHECKOUT = Path(__file__).parents[3]
SUITE = """
name = "tiny"
checkpoint_seconds = 0  # after every step: whatever the moment of the kill, there is something to go on from
[sampling]
weights = 8
snapshots = 20
[probe]
samples = 8
features = 16
[[runs]]
workload = "tinywork:tiny"
train_samples = 320
epochs = 12
optimizer = ["sgd", "adamw"]
lr = [0.01, 0.02]
seed = 3
"""
WORKLOAD = """
from torch import nn
from collect.workloads import Recipe, Workload

def build(source):
    (length,) = source.shape
    embedding = nn.Embedding(source.vocabulary, 4)
    return nn.Sequential(embedding, nn.Flatten(), nn.Linear(4 * length, 16), nn.ReLU(), nn.Linear(16, source.classes))

def tiny():
    return Workload("tiny", "mine", build, "glosses", Recipe(batch_size=32))
"""
RUNS = 4
_PATIENCE = 300.0


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE)
    (tmp_path / "tinywork.py").write_text(WORKLOAD)
    return path


def start(suite: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "collect", "gather", "trajectories", "--suite", str(suite), "--out", str(out)]
    pipe = subprocess.PIPE
    cores = set(list(os.sched_getaffinity(0))[:2])  # one thread a slot, whatever the machine
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(
        [*command, "--slots", "2"],
        cwd=suite.parent,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=_PATIENCE)
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    last = time.monotonic() + _PATIENCE
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.005)


def wait_until_gone(pids: list[int]) -> None:
    last = time.monotonic() + _PATIENCE
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < last, "a worker outlived its parent"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has those that it started
    found = [int(child) for path in lists for child in path.read_text().split()]
    return [child for child in found if b"data.trajectories.child" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_killed_at_several_moments_it_ends_as_if_unbroken(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "run_jobs", run_inline)
        patch.syspath_prepend(tmp_path)
        assert program.main(["gather", "trajectories", "--suite", str(suite), "--out", str(whole)]) == 0
    files = GatherFolder(broken / "trajectories")

    def begun_since(moment: float) -> bool:
        checkpoints = (files.root / "checkpoints").glob("*.pt")
        return any(_changed(path) > moment for path in checkpoints)

    # In the middle of the first runs.
    moment, process = time.time(), start(suite, broken)
    wait_for(lambda: begun_since(moment), process)
    workers = children(process.pid)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert not files.runs
    assert len(workers) == 2

    # When some runs are there and others are not.
    process = start(suite, broken)
    wait_for(lambda: bool(files.runs), process)
    workers += children(process.pid)
    process.kill()
    end(process)
    wait_until_gone(workers)  # until then one may still write a run that it had just ended
    there = len(files.runs)
    assert 1 <= there < RUNS

    # Ctrl-C.
    moment, process = time.time(), start(suite, broken)
    wait_for(lambda: begun_since(moment), process)
    process.send_signal(signal.SIGINT)
    status, printed, complaint = end(process)
    assert status == 130
    assert f"{there} of them there already" in printed
    assert "the same command goes on" in complaint
    assert "Traceback" not in complaint

    # A worker alone: its run is reported, the others are done.
    moment, process = time.time(), start(suite, broken)
    wait_for(lambda: begun_since(moment), process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    status, printed, _ = end(process)
    assert status == 1
    assert printed.count("\nFAILED tinywork:tiny seed=3") == 1
    assert "signal 9" in printed
    assert len(files.runs) == RUNS - 1

    status, printed, _ = end(start(suite, broken))
    assert status == 0
    assert f"{RUNS - 1} of them there already" in printed
    assert not list((files.root / "checkpoints").iterdir())
    assert_same(whole / "trajectories.h5", broken / "trajectories.h5")


def assert_same(one: Path, other: Path) -> None:
    with open_trajectories(one) as first, open_trajectories(other) as second:
        assert first.run_ids == second.run_ids
        assert len(first.run_ids) == RUNS
        for run_id in first.run_ids:
            ours, theirs = first.read(run_id), second.read(run_id)
            assert ours.config == theirs.config
            assert ours.layer_names == theirs.layer_names
            assert _without_times(ours) == _without_times(theirs)
            for name in vars(ours):
                if isinstance(getattr(ours, name), np.ndarray) and name != "seconds_T":
                    assert getattr(ours, name).tobytes() == getattr(theirs, name).tobytes(), name


def _without_times(trajectory: Trajectory) -> tuple[object, ...]:
    outcome = {key: value for key, value in trajectory.outcome.items() if not key.endswith("_seconds")}
    curve = [{key: value for key, value in row.items() if key != "train_seconds"} for row in outcome.pop("curve")]
    return outcome, curve


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its run has just ended
        return 0.0


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()

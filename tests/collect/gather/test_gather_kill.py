"""Gather is killed; what the same command makes of it equals what an unbroken gather leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from collect import __main__ as program
from data.trajectories.folder import GatherFolder
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from tests.collect.inline import put_inline
from tests.processes import running, wait_for

CHECKOUT = Path(__file__).parents[3]
SUITE = """
name = "tiny"
checkpoint_seconds = 0  # after every step: there is always something to resume from
[sampling]
weights = 8
snapshots = 20
[probe]
samples = 8
features = 16
[[runs]]
workload = "tinywork:tiny"
train_samples = 320
epochs = 6
optimizer = ["sgd", "adamw"]
lr = 0.01
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
RUNS = 2


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE)
    (tmp_path / "tinywork.py").write_text(WORKLOAD)
    return path


def test_killed_it_ends_as_if_unbroken(tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when one run is there and the next is under way."""
    files = GatherFolder(tmp_path / "broken" / "trajectories")
    command = [sys.executable, "-m", "collect", *gather(suite, tmp_path / "broken"), "--slots", "1", "--device", "cpu"]
    core = {min(os.sched_getaffinity(0))}  # one thread, whatever the machine
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    wait_for(lambda: bool(files.runs) and any((files.root / "checkpoints").glob("*.pt")), process)
    (worker,) = children(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_for(lambda: not running(worker))

    put_inline(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    assert program.main(gather(suite, tmp_path / "broken")) == 0
    suite.write_text(SUITE.replace("checkpoint_seconds = 0", "checkpoint_seconds = 1000"))
    assert program.main(gather(suite, tmp_path / "whole")) == 0
    assert not list((files.root / "checkpoints").iterdir())
    assert_same(tmp_path / "whole" / "trajectories.h5", tmp_path / "broken" / "trajectories.h5")


def gather(suite: Path, out: Path) -> list[str]:
    return ["gather", "trajectories", "--suite", str(suite), "--out", str(out)]


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has those that it started
    found = [int(child) for path in lists for child in path.read_text().split()]
    return [child for child in found if b"data.trajectories.child" not in Path(f"/proc/{child}/cmdline").read_bytes()]


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

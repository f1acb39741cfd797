"""HDF5 in a child process: its crashes and its end, and how the parent goes on."""

import os
import signal
from pathlib import Path

import pytest

from data.trajectories import child, open_trajectories, write_runs
from predictor.errors import DamagedFile, FileFault
from tests.data.fuzz import lookup3
from tests.data.made import assert_same, made_trajectory, write_changed


@pytest.fixture
def path(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    return tmp_path / "t.h5"


def assert_readable(path):
    with open_trajectories(path) as file:
        assert_same(file.read("mlp-0"), made_trajectory())


def test_a_file_that_hdf5_crashes_on_is_refused_and_the_next_one_is_read(tmp_path, path):
    """The fractal heap of its run has a table of width 0, by which HDF5 2.0 divides."""
    content = bytearray(path.read_bytes())
    heap = content.index(b"FRHP")
    content[heap + 110 : heap + 112] = bytes(2)
    content[heap + 142 : heap + 146] = lookup3(bytes(content[heap : heap + 142])).to_bytes(4, "little")
    (tmp_path / "crash.h5").write_bytes(content)
    with pytest.raises(FileFault, match=r"crash.h5: run mlp-0: .*do not use it"):
        open_trajectories(tmp_path / "crash.h5").read("mlp-0")
    assert_readable(path)


@pytest.mark.parametrize("seen", [False, True], ids=["found at the next request", "already known to have ended"])
def test_a_child_that_is_killed_is_replaced(path, seen):
    assert_readable(path)
    ((_, process),) = child._running
    os.kill(process.pid, signal.SIGKILL)
    if seen:
        process.wait()
    assert_readable(path)
    ((_, other),) = child._running
    assert other.pid != process.pid
    assert process.stdin.closed
    assert process.stdout.closed


def test_faults_come_with_their_kind_and_the_path_as_given(tmp_path, monkeypatch):
    write_changed(tmp_path / "t.h5", lambda run: run.pop("lr"))
    monkeypatch.chdir(tmp_path)
    with (
        open_trajectories(Path("t.h5")) as file,
        pytest.raises(DamagedFile, match=r"^t.h5: run mlp-1: field lr: missing"),
    ):
        file.read("mlp-1")
    with pytest.raises(FileFault, match=r"^none.h5: there is no such file") as caught:
        open_trajectories(Path("none.h5"))
    assert caught.type is FileFault

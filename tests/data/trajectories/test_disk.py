"""A disk that fills up and places that cannot be written to: a clear error, no crash, and nothing lost."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data.trajectories import open_trajectories, write_runs
from data.trajectories.merge import merge
from data.trajectories.writer import new_file
from predictor.errors import FileFault
from predictor.shared.files import written_whole
from tests.data.made import made_trajectory

FULL = r"t.h5: cannot be written .*the disk is full; free some space"


def assert_nothing_lost(folder):
    assert [path.name for path in folder.iterdir()] == ["t.h5"]
    with open_trajectories(folder / "t.h5") as file:
        assert file.read("old").run_id == "old"


@pytest.mark.parametrize("after", [0, 1, 5, 40])
@pytest.mark.parametrize("merging", [False, True])
def test_the_disk_fills_up_at_any_write(tmp_path, monkeypatch, after, merging):
    folder, others = tmp_path / "disk", tmp_path / "others.h5"
    write_runs(folder / "t.h5", [made_trajectory("old")])
    runs = [made_trajectory(f"run-{number}") for number in range(3)]
    write_runs(others, runs)
    write, calls = os.write, []

    def failing(handle, content):
        calls.append(handle)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return write(handle, content[: max(len(content) // 2, 1)])  # and writes only a part

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(FileFault, match=FULL):
        merge([folder / "t.h5", others], folder / "t.h5") if merging else write_runs(folder / "t.h5", runs)
    assert len(calls) == after + 1
    assert_nothing_lost(folder)


def test_the_disks_own_error_comes_before_what_hdf5_makes_of_it(tmp_path, monkeypatch):
    def failing(*_args):
        raise OSError(28, "No space left on device")

    def write():
        with written_whole(tmp_path / "t.h5") as part, new_file(part) as runs:
            monkeypatch.setattr(os, "write", failing)
            with contextlib.suppress(OSError):
                runs.add(made_trajectory())
            raise RuntimeError("HDF5 has read zeros")

    with pytest.raises(FileFault, match=FULL):
        write()


def test_parts_of_a_write_are_put_together(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:7]))
    write_runs(tmp_path / "t.h5", [made_trajectory("old")])
    assert_nothing_lost(tmp_path)


def test_interrupting_a_write(tmp_path, monkeypatch):
    write_runs(tmp_path / "t.h5", [made_trajectory("old")])

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_runs(tmp_path / "t.h5", [made_trajectory("new")])
    monkeypatch.undo()
    assert_nothing_lost(tmp_path)


def test_a_kill_while_writing_leaves_the_older_file(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory("old")])
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from data.trajectories import write_runs
        from tests.data.made import made_trajectory
        def runs():
            yield made_trajectory("new")
            os.kill(os.getpid(), signal.SIGKILL)
        write_runs(Path(sys.argv[1]), runs())
    """
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "t.h5"], cwd=Path(__file__).parents[3])
    assert ended.returncode == -9
    with open_trajectories(tmp_path / "t.h5") as file:
        assert file.run_ids == ("old",)
    write_runs(tmp_path / "t.h5", [made_trajectory("old")])  # what the kill left does not stand in the way
    assert_nothing_lost(tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileFault, match=r"t.h5: cannot be written .*: choose another place with --out"):
        write_runs(tmp_path / "file" / "t.h5", [made_trajectory()])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders cannot even be entered by others
    try:
        write_runs(folder / "t.h5", [made_trajectory("old")])
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(
                FileFault, match=r"t.h5: cannot be written \(Permission denied\): .*make that one writable"
            ):
                write_runs(folder / "t.h5", [made_trajectory("new")])
        finally:
            os.seteuid(user)
        assert_nothing_lost(folder)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)

"""Every file name, and names that would lead elsewhere."""

from pathlib import Path

import pytest

from data.trajectories.folder import GatherFolder, trajectory_files
from predictor.errors import UsageError


def test_every_file_has_its_place():
    folder = GatherFolder(Path("x/trajectories"))
    assert folder.run("a-1") == Path("x/trajectories/runs/a-1.h5")
    assert folder.log("a-1") == Path("x/trajectories/logs/a-1.log")
    assert folder.checkpoint("a-1") == Path("x/trajectories/checkpoints/a-1.pt")
    assert folder.packed == Path("x/trajectories.h5")
    assert GatherFolder().packed == Path("runs/trajectories.h5")


def test_runs_that_have_ended(tmp_path):
    folder = GatherFolder(tmp_path)
    assert folder.runs == []
    assert not folder.has_run("b")
    folder.run("b").parent.mkdir()
    for name in ("b.h5", "a.h5", "c.h5.part"):
        (tmp_path / "runs" / name).touch()
    assert folder.runs == [folder.run("a"), folder.run("b")]
    assert folder.has_run("b")
    assert not folder.has_run("c")
    assert trajectory_files([tmp_path, Path("other.h5")]) == [folder.run("a"), folder.run("b"), Path("other.h5")]


@pytest.mark.parametrize("run_id", ["", "..", "../x", "a/b", "a\\b", "/etc/passwd", ".x", "a b", "a\n", "x" * 101, "ä"])
def test_ids_that_are_path_tricks(run_id):
    folder = GatherFolder(Path("x"))
    for name in (folder.run, folder.log, folder.checkpoint):
        with pytest.raises(UsageError, match="run_id="):
            name(run_id)

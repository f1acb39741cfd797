"""Merging: real copies, verified; duplicates refused or skipped as asked."""

import h5py
import numpy as np
import pytest

from data.trajectories import GatherFolder, open_trajectories, write_runs
from data.trajectories.merge import merge, stored_digest
from data.trajectories.reader import TrajectoryFile
from data.trajectories.writer import NewRuns
from predictor.errors import FileFault, UsageError
from tests.data.made import assert_same, made_trajectory, write_changed


@pytest.fixture
def two(tmp_path):
    """Two files: runs a and b, and run c."""
    write_runs(tmp_path / "one.h5", [made_trajectory("b"), made_trajectory("a")])
    write_runs(tmp_path / "two.h5", [made_trajectory("c", layers=2)])
    return [tmp_path / "one.h5", tmp_path / "two.h5"]


def test_the_copies_stand_without_their_sources(two, tmp_path):
    summary = merge(two, tmp_path / "out" / "all.h5")
    for path in two:
        path.unlink()
    with open_trajectories(tmp_path / "out" / "all.h5") as file:
        assert file.run_ids == ("a", "b", "c")
        assert_same(file.read("b"), made_trajectory("b"))
        assert_same(file.read("c"), made_trajectory("c", layers=2))
    assert (summary.runs, summary.files, summary.skipped) == (3, 2, ())
    assert str(summary).startswith(f"{tmp_path / 'out' / 'all.h5'}: 3 runs from 2 files, 0.0 MB")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["all.h5"]


def test_nothing_in_the_merged_file_is_a_link(two, tmp_path):
    merge(two, tmp_path / "all.h5")
    with h5py.File(tmp_path / "all.h5") as file:
        for run in file["runs"].values():
            for name in run:
                assert isinstance(run.get(name, getlink=True), h5py.HardLink)
                assert not run[name].is_virtual
                assert not run[name].external
                assert run[name].compression == "gzip"


def test_merging_what_was_merged_gives_the_same_bytes(two, tmp_path):
    merge(two, tmp_path / "all.h5")
    merge(two[::-1], tmp_path / "again.h5")
    merge([tmp_path / "all.h5"], tmp_path / "third.h5")
    with open_trajectories(tmp_path / "all.h5") as one, open_trajectories(tmp_path / "again.h5") as other:
        assert [one.checksum(run_id) for run_id in one.run_ids] == [other.checksum(run_id) for run_id in other.run_ids]
    assert (tmp_path / "third.h5").stat().st_size == (tmp_path / "all.h5").stat().st_size


def test_duplicates_are_refused_by_name_and_nothing_is_written(two, tmp_path):
    write_runs(tmp_path / "three.h5", [made_trajectory("a")])
    with pytest.raises(UsageError) as caught:
        merge([*two, tmp_path / "three.h5"], tmp_path / "all.h5")
    for words in ("run a", "one.h5", "three.h5", "--on-duplicate skip"):
        assert words in str(caught.value)
    assert not list(tmp_path.glob("all*"))


def test_duplicates_are_skipped_when_asked_and_the_first_stays(two, tmp_path):
    later = made_trajectory("a", loss_T=np.zeros(5, dtype=np.float32))
    write_runs(tmp_path / "three.h5", [later, made_trajectory("d")])
    summary = merge([*two, tmp_path / "three.h5"], tmp_path / "all.h5", "skip")
    assert (summary.runs, summary.skipped) == (4, ("a",))
    assert "1 duplicates skipped" in str(summary)
    with open_trajectories(tmp_path / "all.h5") as file:
        assert file.run_ids == ("a", "b", "c", "d")
        assert_same(file.read("a"), made_trajectory("a"))


def test_the_new_file_may_be_one_of_the_old(two, tmp_path):
    merge(two, two[0])
    with open_trajectories(two[0]) as file:
        assert file.run_ids == ("a", "b", "c")


def test_gather_folders_are_merged_by_their_runs(tmp_path):
    folder = GatherFolder(tmp_path / "trajectories")
    for name in ("a", "b"):
        write_runs(folder.run(name), [made_trajectory(name)])
    assert merge([folder.root], folder.packed).runs == 2
    with open_trajectories(tmp_path / "trajectories.h5") as file:
        assert file.run_ids == ("a", "b")


def test_an_unsound_source_is_named_and_the_older_result_stays(two, tmp_path):
    merge(two, tmp_path / "all.h5")
    bad = write_changed(tmp_path / "bad.h5", lambda run: run["weights"].write_direct(np.ones((5, 3, 4), dtype="<f4")))
    with pytest.raises(FileFault, match=r"bad.h5: run mlp-1: .*checksum"):
        merge([two[0], bad], tmp_path / "all.h5")
    with open_trajectories(tmp_path / "all.h5") as file:
        assert len(file) == 3
    assert not list(tmp_path.glob("*.part"))


def test_copies_are_verified(two, tmp_path, monkeypatch):
    copy = NewRuns.copy

    def careless(runs, source, run_id):
        copy(runs, source, run_id)
        runs._group[run_id]["weights"][0, 0, 0] = 99

    monkeypatch.setattr(NewRuns, "copy", careless)
    with pytest.raises(FileFault, match=r"one.h5: run a: its copy is not what was verified: merge again"):
        merge(two, tmp_path / "all.h5")
    assert not list(tmp_path.glob("all*"))


def digests(path):
    with open_trajectories(path) as file:
        return {run_id: stored_digest(file, run_id) for run_id in file.run_ids}


def test_each_run_is_decoded_once_and_not_at_all_where_the_caller_has_read_it(two, tmp_path, monkeypatch):
    decoded, examine = [], TrajectoryFile.examine
    monkeypatch.setattr(
        TrajectoryFile, "examine", lambda file, run_id: (decoded.append(run_id), examine(file, run_id))[1]
    )
    merge(two, tmp_path / "all.h5")
    assert sorted(decoded) == ["a", "b", "c"]
    decoded.clear()
    merge(two, tmp_path / "all.h5", verified=digests(two[0]))
    assert decoded == ["c"]


def test_a_source_that_has_changed_since_it_was_verified_is_noticed(two, tmp_path):
    verified = digests(two[1])
    write_runs(two[1], [made_trajectory("c", layers=3)])
    with pytest.raises(FileFault, match=r"two.h5: run c: its copy is not what was verified"):
        merge(two, tmp_path / "all.h5", verified=verified)
    assert not list(tmp_path.glob("all*"))


def test_nothing_to_merge(tmp_path):
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], tmp_path / "all.h5")
    with pytest.raises(FileFault, match=r"a folder without runs"):
        merge([tmp_path], tmp_path / "all.h5")
    with pytest.raises(FileFault, match=r"none.h5: there is no such file"):
        merge([tmp_path / "none.h5"], tmp_path / "all.h5")

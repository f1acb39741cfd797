"""Files that an accident left: truncated, mutated, of another version, or no trajectory file at all."""

import os

import h5py
import numpy as np
import pytest

from data.trajectories import open_trajectories, write_runs
from data.trajectories.trajectory import arrays_of
from data.trajectories.validate import validate
from predictor.errors import DamagedFile, FileFault
from tests.data.fuzz import fuzz
from tests.data.made import assert_same, made_trajectory, write_raw

RUNS = [made_trajectory("mlp-0"), made_trajectory("mlp-1")]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.h5"
    write_runs(path, RUNS)
    return path.read_bytes()


def sound_or_refused(path):
    """Whether a file is refused; if it is not, it must hold what was written."""
    try:
        with open_trajectories(path) as file:
            read = list(file)
    except FileFault:
        return True
    for want, got in zip(RUNS, read, strict=True):
        assert_same(want, got)
    return False


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, good, share):
    path = tmp_path / "t.h5"
    path.write_bytes(good[: int(share * len(good))])
    assert sound_or_refused(path)
    assert validate(path)


def test_mutated_files_are_refused_or_read_as_written():
    """The first of the files that `python -m tests.data.fuzz` tries."""
    fates = fuzz(200)
    assert fates["refused"] > 100
    assert fates["crashes"] < 5
    assert sum(fates.values()) == 200


def test_a_wrong_value_behind_right_hdf5_is_found_by_the_checksum(tmp_path, good):
    path = tmp_path / "good.h5"
    with h5py.File(path, "r+") as file:
        file["runs/mlp-1/weights"][2, 1, 3] += 1
    with open_trajectories(path) as file:
        assert_same(file.read("mlp-0"), RUNS[0])
        with pytest.raises(DamagedFile, match=r"good.h5: run mlp-1: .*checksum.*make it with"):
            file.read("mlp-1")


def test_a_run_under_another_name_is_found_by_the_checksum(tmp_path, good):
    with h5py.File(tmp_path / "good.h5", "r+") as file:
        file.move("runs/mlp-1", "runs/mlp-2")
    with open_trajectories(tmp_path / "good.h5") as file, pytest.raises(FileFault, match=r"run mlp-2: .*checksum"):
        file.read("mlp-2")


@pytest.mark.parametrize(("version", "cure"), [(3, "update the toolkit"), (0, "gather it again")])
def test_another_version(tmp_path, version, cure):
    path = write_raw(tmp_path / "t.h5", {"mlp-0": arrays_of(RUNS[0])}, version=version)
    with pytest.raises(FileFault, match=f"version {version}, but this toolkit reads 1 to 2: {cure}") as caught:
        open_trajectories(path)
    assert isinstance(caught.value, DamagedFile) == (version < 1)


@pytest.mark.parametrize("change", ["no format", "another format", "version as text", "no runs", "runs a dataset"])
def test_hdf5_of_something_else(tmp_path, good, change):
    path = tmp_path / "good.h5"
    with h5py.File(path, "r+") as file:
        if change == "no format":
            del file.attrs["format"]
        elif change == "another format":
            file.attrs["format"] = np.bytes_("weather")
        elif change == "version as text":
            del file.attrs["version"]
            file.attrs["version"] = np.bytes_("1")
        else:
            del file["runs"]
            if change == "runs a dataset":
                file["runs"] = 1
    assert sound_or_refused(path)


def test_files_that_are_no_hdf5(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(FileFault, match=r"text.h5: HDF5 cannot read it"):
        open_trajectories(tmp_path / "text.h5")
    with pytest.raises(FileFault, match=r"none.h5: there is no such file: make it with `python -m collect gather"):
        open_trajectories(tmp_path / "none.h5")
    with pytest.raises(FileFault, match="not a regular file"):
        open_trajectories(tmp_path)
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(FileFault, match="not a regular file"):
        open_trajectories(tmp_path / "pipe.h5")


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        PermissionError(13, "Permission denied"),
        MemoryError("Unable to allocate 9 GiB"),
        KeyError("Unable to open object (file read failed: errno = 5, error message = 'Input/output error')"),
    ],
)
def test_what_the_machine_fails_at_is_no_damage(tmp_path, good, monkeypatch, in_process, error):
    def failing(*_args, **_options):
        raise error

    monkeypatch.setattr("data.trajectories.guard.h5py.File", failing)
    with pytest.raises(FileFault, match=r"good.h5: HDF5 cannot read it \(.*try again") as caught:
        open_trajectories(tmp_path / "good.h5")
    assert caught.type is FileFault


def test_validate_names_every_fault(tmp_path, good):
    path = tmp_path / "good.h5"
    with h5py.File(path, "r+") as file:
        file["beside"] = 1
        file.move("runs/mlp-1", "runs/bad name")
        run = file["runs/mlp-0"]
        del run["lr"]
        run["more"] = 1
        run["config"][:10] = 0
        del run["weights"]
        run["weights"] = h5py.SoftLink("/runs")
    faults = "\n".join(map(str, validate(path)))
    for words in (
        "'beside'",
        "run bad name: a run's id",
        "run mlp-0: field lr: missing",
        "run mlp-0: field more: the format has no such field",
        "run mlp-0: field config: not valid JSON",
        "run mlp-0: field weights: a soft link",
    ):
        assert words in faults
    assert len(validate(path)) == 6


def test_validate_finds_nothing_wrong_with_a_sound_file(tmp_path, good):
    assert validate(tmp_path / "good.h5") == []

"""What is written is what is read; what a reader would refuse is not written."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.trajectories import LabelRule, TrajectoryFile, open_trajectories, write_runs
from data.trajectories.merge import merge
from data.trajectories.schema import FIELDS, FORMAT, FORMAT_VERSION, WRITTEN
from data.trajectories.summary import describe
from data.trajectories.trajectory import arrays_of, checksum
from data.trajectories.validate import validate
from predictor.errors import FileFault, UsageError
from tests.data.made import assert_same, made_trajectory


def test_runs_come_back_as_they_were(tmp_path):
    nan_TL = np.full((5, 3), np.nan, dtype=np.float32)
    diverged = made_trajectory(
        "b.2_x-Y",
        outcome={"status": "diverged", "final_accuracy": None},
        similarity_TL=nan_TL,
        loss_T=np.array([np.nan, 1, 2, np.inf, np.nan], dtype=np.float32),
        weights_TLK=np.full((5, 3, 4), np.nan, dtype=np.float32),
    )
    runs = [diverged, made_trajectory("a"), made_trajectory("c", snapshots=1, layers=1, weights=1)]
    write_runs(tmp_path / "new" / "t.h5", iter(runs))
    with open_trajectories(tmp_path / "new" / "t.h5") as file:
        assert file.run_ids == ("a", "b.2_x-Y", "c")
        assert len(file) == 3
        for want, got in zip(sorted(runs, key=lambda run: run.run_id), file, strict=True):
            assert_same(want, got)
        assert file.read("a").finished
        assert not file.read("b.2_x-Y").finished
        got.weights_TLK[0] = 7  # arrays are the caller's own


def test_random_weights_survive_compression_and_shuffling(tmp_path):
    weights_TLK = np.random.default_rng(0).normal(size=(20, 4, 256)).astype(np.float32)
    run = made_trajectory(snapshots=20, layers=4, weights=256, weights_TLK=weights_TLK)
    write_runs(tmp_path / "t.h5", [run])
    with open_trajectories(tmp_path / "t.h5") as file:
        np.testing.assert_array_equal(file.read("mlp-0").weights_TLK, weights_TLK)
    with h5py.File(tmp_path / "t.h5") as file:  # and plain h5py reads the same
        np.testing.assert_array_equal(file["runs/mlp-0/weights"][:], weights_TLK)
        assert file.attrs["format"] == FORMAT.encode()
        assert file.attrs["version"] == FORMAT_VERSION
        stored = file["runs/mlp-0/weights"]
        assert (stored.compression, stored.compression_opts, stored.shuffle) == ("gzip", 4, True)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        write_runs(tmp_path / name, [made_trajectory("a"), made_trajectory("b")])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_nothing_is_left_beside_the_file(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    run = made_trajectory(provenance={"a": [float("nan"), {"b": float("inf")}], "c": (1, 2)})
    write_runs(tmp_path / "t.h5", [run])
    with open_trajectories(tmp_path / "t.h5") as file:
        assert file.read("mlp-0").provenance == {"a": [None, {"b": None}], "c": [1, 2]}


def test_a_run_that_is_not_there(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    with open_trajectories(tmp_path / "t.h5") as file, pytest.raises(UsageError, match=r"no run 'x'.*inspect"):
        file.read("x")


def test_the_checksum_covers_id_values_shapes_and_names():
    arrays = arrays_of(made_trajectory())
    sums = {checksum("mlp-0", arrays), checksum("mlp-1", arrays)}
    for field in WRITTEN:
        changed = arrays[field.name].copy()
        changed.reshape(-1).view(np.uint8)[-1] ^= 1
        sums.add(checksum("mlp-0", {**arrays, field.name: changed}))
    reshaped = arrays["weights"].reshape(3, 5, 4)
    sums.add(checksum("mlp-0", {**arrays, "weights": reshaped}))
    assert len(sums) == len(WRITTEN) + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "../up"}, "run_id='../up'"),
        ({"run_id": ""}, "run_id=''"),
        ({"lr_T": np.zeros(4)}, "lr: T = 4 where step has T = 5"),
        ({"weights_TLK": np.zeros((5, 2, 4))}, "weights: L = 2 where layer_sizes has L = 3"),
        ({"weights_TLK": np.zeros((5, 3, 5))}, "K = 5 where config samples 4"),
        ({"weights_TLK": np.full((5, 3, 4), np.nan)}, "not finite"),
        ({"weights_TLK": np.zeros((5, 3))}, "weights: 2 dimensions where 3 are expected"),
        ({"step_T": np.array([0, 1, 1, 2, 3])}, "steps do not grow"),
        ({"step_T": np.array([0, 1, 2, 3, 41])}, "step 41, after the run's 40"),
        ({"lr_T": np.array([0.1, np.nan, 0, 0, 0])}, "lr: a learning rate"),
        ({"seconds_T": np.array([0, 2, 1, 3, 4.0])}, "runs backwards"),
        ({"gradient_norm_TL": np.full((5, 3), -1)}, "negative norm"),
        ({"similarity_TL": np.full((5, 3), np.inf)}, "infinite similarity"),
        ({"layer_sizes_L": np.array([1, 0, 2])}, "without weights"),
        ({"layer_names": ("a", "b")}, "2 names for 3 layers"),
        ({"layer_names": ("a", "b", "a")}, "two layers have the same name"),
        ({"config": {}}, "config: workload: missing"),
        ({"outcome": {"status": "running"}}, "status: 'running'"),
        ({"outcome": {"status": "finished"}}, "final_accuracy, final_loss, train_seconds, cpu_seconds: missing"),
        ({"provenance": {"when": object()}}, "not JSON serializable"),
        ({"provenance": {"text": "x" * (1 << 20)}}, "provenance: bytes = "),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(tmp_path, changes, message):
    with pytest.raises(UsageError) as caught:
        write_runs(tmp_path / "t.h5", [made_trajectory("first"), made_trajectory(**changes)])
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"total_steps": 0}, "total_steps: 0"), ({"sampling": {"weights": 4}}, "sampling.seed: missing")],
)
def test_a_configuration_that_says_too_little_is_not_written(tmp_path, changes, message):
    run = made_trajectory()
    with pytest.raises(UsageError, match=message):
        write_runs(tmp_path / "t.h5", [replace(run, config={**run.config, **changes})])


def test_the_same_run_twice_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="run mlp-0: twice"):
        write_runs(tmp_path / "t.h5", [made_trajectory(), made_trajectory()])


def test_no_run_at_all_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="no runs"):
        write_runs(tmp_path / "t.h5", [])


def test_runs_are_taken_one_by_one_and_an_error_keeps_the_older_file(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory("old")])

    def runs():
        yield made_trajectory("new")
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_runs(tmp_path / "t.h5", runs())
    with open_trajectories(tmp_path / "t.h5") as file:
        assert file.run_ids == ("old",)
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]


def test_a_file_is_closed_after_a_fault(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["beside"] = 1
    with pytest.raises(FileFault, match="'beside'"):
        open_trajectories(tmp_path / "t.h5")
    lenient = TrajectoryFile(tmp_path / "t.h5")
    assert lenient.read("mlp-0").run_id == "mlp-0"
    lenient.close()
    with h5py.File(tmp_path / "t.h5", "r+"):  # HDF5 refuses this while the file is open for reading
        pass


def test_a_file_of_version_1_is_read_and_merged(tmp_path):
    """It was written by the toolkit before `update_norm` went: its runs have that field, and count it in checksums."""
    old = Path(__file__).parent / "version-1.h5"
    with h5py.File(old) as file:
        assert file.attrs["version"] == 1
        assert "update_norm" in file["runs/mlp-0"]
    write_runs(tmp_path / "new.h5", [made_trajectory("mlp-2")])
    merge([old, tmp_path / "new.h5"], tmp_path / "all.h5")
    for path, count in ((old, 2), (tmp_path / "all.h5", 3)):
        with open_trajectories(path) as file:
            assert len(file) == count
            assert_same(file.read("mlp-0"), made_trajectory("mlp-0", snapshots=3, layers=2))
            assert not file.read("mlp-1").finished
        assert validate(path) == []
    assert "format version 1 and 2" in describe([old, tmp_path / "new.h5"], LabelRule())
    with h5py.File(tmp_path / "new.h5") as file:
        assert set(file["runs/mlp-2"]) == {field.name for field in FIELDS} - {"update_norm"}

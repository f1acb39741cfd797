"""Runs, fields, attributes and JSON parts that the format does not have, or not so."""

import numpy as np
import pytest

from data.trajectories import TrajectoryFile, open_trajectories
from data.trajectories.trajectory import arrays_of
from predictor.errors import FileFault
from tests.data.hostile import refused
from tests.data.made import made_trajectory, write_arrays, write_changed, write_raw


def test_extra_and_missing_fields(tmp_path):
    refused(write_changed(tmp_path / "a.h5", lambda run: run.create_group("more")), "field more", "no such field")
    refused(write_changed(tmp_path / "b.h5", lambda run: run.pop("lr")), "run mlp-1", "field lr", "missing")
    refused(write_changed(tmp_path / "c.h5", lambda run: run.move("lr", "lr\x1b[31m")), "field lr", "missing")


def test_attributes_that_the_format_does_not_have(tmp_path):
    refused(write_changed(tmp_path / "a.h5", lambda run: run["lr"].attrs.create("x", 1)), "field lr", "1 attributes")
    refused(write_changed(tmp_path / "b.h5", lambda run: run.attrs.create("x", 1)), "run mlp-1", "2 attributes")
    refused(write_changed(tmp_path / "c.h5", lambda run: run.parent.attrs.create("x", 1)), "1 attributes")
    refused(write_changed(tmp_path / "d.h5", lambda run: run.file.attrs.create("x", 1)), "3 attributes")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.bytes_("0" * 64), "checksum"),
        (np.bytes_("0" * 2000), "of a type"),
        ("0" * 64, "of a type"),  # h5py writes text of variable length
        (np.array([b"0" * 64, b"1" * 64]), "not a single value"),
        (1.5, "of a type"),
        (7, "checksum"),
    ],
)
def test_checksums_that_are_none(tmp_path, value, words):
    def change(run):
        del run.attrs["sha256"]
        run.attrs["sha256"] = value

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", words)
    refused(write_changed(tmp_path / "u.h5", lambda run: run.attrs.pop("sha256")), "run mlp-1", "0 attributes")


@pytest.mark.parametrize("field", ["weights", "lr", "layer_sizes"])
def test_fields_that_disagree_about_a_dimension(tmp_path, field):
    shapes = {"weights": (5, 2, 4), "lr": (6,), "layer_sizes": (4,)}
    array = np.ones(shapes[field], dtype={"weights": "<f4", "lr": "<f8", "layer_sizes": "<i8"}[field])
    path = write_arrays(tmp_path / "t.h5", **{field: array})
    # Whichever comes first in the table is believed, so that the fault may be named at another field.
    refused(path, "run mlp-1", "field ", " where ")


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("config", b"{", "not valid JSON"),
        ("config", b"\xff\xfe", "not valid JSON"),
        ("config", b"[" * 100_000, "nested too deeply"),
        ("config", b"1" * 10_000, "not valid JSON"),
        ("config", b"[]", "a JSON object is expected"),
        ("config", b'{"seed": NaN}', "NaN is not JSON"),
        ("config", b"{}", "'workload' is None"),
        ("outcome", b'{"status": "finished", "final_accuracy": 1e999}', "out of its range"),
        ("provenance", b"7", "a JSON object is expected"),
        ("layer_names", b'{"a": 1}', "not a list of names"),
        ("layer_names", b'["a", "b", 3]', "not a list of names"),
        ("layer_names", b'["a", "b"]', "2 names for 3 layers"),
    ],
)
def test_json_parts_that_are_none(tmp_path, field, text, words):
    path = write_arrays(tmp_path / "t.h5", **{field: np.frombuffer(text, dtype=np.uint8)})
    refused(path, "run mlp-1", f"field {field}", words)


@pytest.mark.parametrize("name", ["..", "a b", "~root", "-x", ".x", "é", "x" * 101, "a\\b", "x\n", "C:x", "\x1b[31m"])
def test_run_ids_that_are_path_tricks(tmp_path, name):
    path = write_changed(tmp_path / "t.h5", lambda run: run.parent.move("mlp-1", name))
    with pytest.raises(FileFault, match="run's id") as caught:
        open_trajectories(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    with TrajectoryFile(path) as file:
        assert file.run_ids == ("mlp-0",)


def test_a_run_id_with_a_slash_inside_one_name(tmp_path):
    path = write_raw(tmp_path / "t.h5", {"upXetc": arrays_of(made_trajectory())}, libver="earliest")
    content = path.read_bytes()
    assert content.count(b"upXetc") == 1
    path.write_bytes(content.replace(b"upXetc", b"../etc"))
    with pytest.raises(FileFault, match=r"run \.\./etc: a run's id"):
        open_trajectories(path)


def test_more_runs_than_a_file_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr("data.trajectories.reader.MOST_RUNS", 50)

    def change(run):
        for place in range(60):
            run.parent[f"copy-{place}"] = run

    with pytest.raises(FileFault, match="more than the 50 members"):
        open_trajectories(write_changed(tmp_path / "t.h5", change))


def test_more_fields_than_a_run_may_have(tmp_path):
    def change(run):
        for place in range(1_001):
            run[f"more-{place}"] = run["lr"]

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "more than the 1000 members")


def test_the_sound_run_beside_a_hostile_one_is_read(tmp_path):
    path = write_changed(tmp_path / "t.h5", lambda run: run.pop("lr"))
    with open_trajectories(path) as file:
        assert file.read("mlp-0").run_id == "mlp-0"

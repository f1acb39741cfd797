"""Files that no accident makes: shapes, storage, types, filters, names and JSON that the format does not have."""

import struct
import zlib

import h5py
import numpy as np
import pytest

from data.trajectories import TrajectoryFile, open_trajectories
from data.trajectories.schema import WRITTEN
from data.trajectories.trajectory import arrays_of
from predictor.errors import FileFault
from tests.data.hostile import put, refused, refused_in_little_memory
from tests.data.made import made_trajectory, write_arrays, write_changed, write_raw

pytestmark = pytest.mark.usefixtures("in_process")
SHAPE = (5, 3, 4)
STORED = {"chunks": SHAPE, "compression": "gzip", "shuffle": True}


@pytest.mark.parametrize(
    ("field", "shape", "chunks", "words"),
    [
        ("weights", (100_000, 4_000, 6_500), (1, 4_000, 6_500), "one chunk"),  # ten terabytes
        ("weights", (5, 3, 80_000), (5, 3, 80_000), "K = 80000"),
        ("weights", (5, 3, 4), (1, 3, 4), "one chunk"),
        ("weights", (1000, 100, 2600), (1000, 100, 2600), "T = 1000"),
        ("weights", (5, 3, 60_000), (5, 3, 60_000), "stores none"),
        ("config", (1 << 21,), (1 << 21,), "bytes = 2097152"),
    ],
)
def test_a_declared_size_is_checked_before_reading(tmp_path, field, shape, chunks, words):
    def make(run, name):
        kind = {"weights": "<f4", "config": "u1"}[field]
        run.create_dataset(name, shape=shape, dtype=kind, chunks=chunks, compression="gzip", shuffle=True)

    path = write_changed(tmp_path / "t.h5", put(field, make))
    assert path.stat().st_size < 100_000
    refused_in_little_memory(path, "run mlp-1", f"field {field}", words)


def test_the_declared_sizes_of_a_run_are_added_up_before_one_is_read(tmp_path, monkeypatch):
    def change(run):
        sizes = {"T": 50_000, "L": 2_000, "K": 1}
        for field in WRITTEN:
            if not field.json:
                shape = tuple(sizes[dim] for dim in field.dims)
                del run[field.name]
                run.create_dataset(
                    field.name, shape=shape, dtype=field.dtype, chunks=shape, compression="gzip", shuffle=True
                )

    path = write_changed(tmp_path / "t.h5", change)
    monkeypatch.setattr("data.trajectories.guard.stored_chunk", lambda *_: pytest.fail("read"))
    with TrajectoryFile(path) as file, pytest.raises(FileFault, match=r"field weights: .* more than the limit"):
        file.read("mlp-1")


def stored(content, shape=SHAPE):
    """A change that puts `content` into the file as the weights' compressed chunk."""

    def make(run, name):
        dataset = run.create_dataset(name, shape=shape, dtype="<f4", **{**STORED, "chunks": shape})
        dataset.id.write_direct_chunk((0,) * len(shape), content)

    return put("weights", make)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stored(zlib.compress(bytes(10**6))), "241 bytes or more where its shape needs 240"),
        (stored(zlib.compress(bytes(10**8))), "stores"),  # 100 MB in 97 kB
        (stored(zlib.compress(bytes(10**8)), (5, 3, 7000)), "420001 bytes or more"),
        (stored(zlib.compress(bytes(200))), "200 bytes"),
        (stored(b"no deflate"), "compressed data are broken"),
    ],
)
def test_compressed_data_expand_no_further_than_declared(tmp_path, change, words):
    refused_in_little_memory(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", words)


@pytest.mark.parametrize("claimed", [900_000_000, 10_500])
def test_a_chunk_that_ends_beyond_the_file_or_its_size(tmp_path, claimed):
    runs = {"mlp-1": arrays_of(made_trajectory("mlp-1", snapshots=40))}
    path = write_raw(tmp_path / "t.h5", runs, libver="earliest")  # without HDF5's own checksums
    with h5py.File(path) as file:
        size = file["runs/mlp-1/weights"].id.get_chunk_info(0).size
    content = path.read_bytes()
    key = struct.pack("<II", size, 0)
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, struct.pack("<II", claimed, 0)))
    refused_in_little_memory(path, "run mlp-1", "field weights", "bytes")


@pytest.mark.parametrize(
    "kind",
    [
        h5py.string_dtype(),
        h5py.vlen_dtype(np.float32),
        h5py.ref_dtype,
        h5py.regionref_dtype,
        np.dtype([("a", "<f4")]),
        np.dtype(">f4"),
        np.dtype("<f8"),
        np.dtype("V4"),
        h5py.enum_dtype({"A": 1}, "i4"),
    ],
)
def test_types_that_the_format_does_not_have(tmp_path, kind):
    change = put("weights", lambda run, name: run.create_dataset(name, shape=SHAPE, dtype=kind, chunks=SHAPE))
    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", "type class", "not <f4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "not in chunks"),
        ({"chunks": SHAPE}, "filters ()"),
        ({"chunks": SHAPE, "compression": "lzf"}, "filters (32000,)"),
        ({**STORED, "fletcher32": True}, "filters (2, 1, 3)"),
        ({**STORED, "maxshape": (None, 3, 4)}, "one chunk of fixed size"),
    ],
)
def test_storage_and_filters_that_the_format_does_not_use(tmp_path, options, words):
    change = put("weights", lambda run, name: run.create_dataset(name, data=np.zeros(SHAPE, "<f4"), **options))
    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", words)


def test_a_filter_that_would_load_a_plugin(tmp_path):
    path = write_raw(tmp_path / "t.h5", {"mlp-1": arrays_of(made_trajectory("mlp-1"))}, libver="earliest")
    with h5py.File(path, "r+") as file:
        run = file["runs/mlp-1"]
        del run["weights"]
        run.create_dataset("weights", data=np.zeros(SHAPE, "<f4"), chunks=SHAPE, compression="lzf")
    content = path.read_bytes()
    lzf, unknown = struct.pack("<HH", 32000, 8), struct.pack("<HH", 32015, 8)
    assert content.count(lzf) == 1
    path.write_bytes(content.replace(lzf, unknown))
    refused(path, "run mlp-1", "field weights", "filters (32015,)")


def test_members_and_attributes_that_the_format_does_not_have(tmp_path):
    refused(write_changed(tmp_path / "a.h5", lambda run: run.create_group("more")), "field more", "no such field")
    refused(write_changed(tmp_path / "b.h5", lambda run: run.pop("lr")), "run mlp-1", "field lr", "missing")
    refused(write_changed(tmp_path / "c.h5", lambda run: run["lr"].attrs.create("x", 1)), "field lr", "1 attributes")
    refused(write_changed(tmp_path / "d.h5", lambda run: run.attrs.create("x", 1)), "run mlp-1", "2 attributes")
    refused(write_changed(tmp_path / "e.h5", lambda run: run.parent.attrs.create("x", 1)), "1 attributes")
    refused(write_changed(tmp_path / "f.h5", lambda run: run.file.attrs.create("x", 1)), "3 attributes")
    empty = put("weights", lambda run, name: run.create_dataset(name, data=h5py.Empty("<f4")))
    refused(write_changed(tmp_path / "g.h5", empty), "field weights")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "0 attributes"),
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
        if value is not None:
            run.attrs["sha256"] = value

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", words)


@pytest.mark.parametrize("field", ["weights", "lr", "layer_sizes"])
def test_fields_that_disagree_about_a_dimension(tmp_path, field):
    shapes = {"weights": (5, 2, 4), "lr": (6,), "layer_sizes": (4,)}
    array = np.ones(shapes[field], dtype={"weights": "<f4", "lr": "<f8", "layer_sizes": "<i8"}[field])
    # The field that comes first in the table counts as right, so that the fault may be named at another one.
    refused(write_arrays(tmp_path / "t.h5", **{field: array}), "run mlp-1", "field ", " where ")


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("config", b"{", "not valid JSON"),
        ("config", b"\xff\xfe", "not valid JSON"),
        ("config", b"[" * 100_000, "nested too deeply"),
        ("config", b"1" * 10_000, "not valid JSON"),
        ("config", b"[]", "a JSON object is expected"),
        ("config", b'{"seed": NaN}', "NaN is not JSON"),
        ("config", b"{}", "workload: missing"),
        ("outcome", b'{"status": "finished", "final_accuracy": 1e999}', "final_accuracy: inf"),
        ("outcome", b'{"status": "finished"}', "final_loss, train_seconds, cpu_seconds: missing"),
        ("outcome", b'{"status": "finish"}', "status: 'finish': did you mean 'finished'"),
        ("provenance", b"7", "a JSON object is expected"),
        ("layer_names", b'{"a": 1}', "not a list of names"),
        ("layer_names", b'["a", "b", 3]', "not a list of names"),
        ("layer_names", b'["a", "b"]', "2 names for 3 layers"),
    ],
)
def test_json_parts_that_are_none(tmp_path, field, text, words):
    path = write_arrays(tmp_path / "t.h5", **{field: np.frombuffer(text, dtype=np.uint8)})
    refused(path, "run mlp-1", f"field {field}", words)


@pytest.mark.parametrize("name", ["..", "a b", "-x", ".x", "é", "x" * 101, "x\n", "\x1b[31m"])
def test_run_ids_that_are_path_tricks(tmp_path, name):
    path = write_changed(tmp_path / "t.h5", lambda run: run.parent.move("mlp-1", name))
    with pytest.raises(FileFault, match="run's id") as caught:
        open_trajectories(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    with TrajectoryFile(path) as file:
        assert file.run_ids == ("mlp-0",)


def test_a_run_id_with_a_slash_inside_one_name(tmp_path):
    path = write_raw(tmp_path / "t.h5", {"upXetc": arrays_of(made_trajectory())}, libver="earliest")
    content = path.read_bytes()
    assert content.count(b"upXetc") == 1
    path.write_bytes(content.replace(b"upXetc", b"../etc"))
    with pytest.raises(FileFault, match=r"run \.\./etc: a run's id"):
        open_trajectories(path)


def test_more_members_than_a_group_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr("data.trajectories.guard.MOST_RUNS", 50)
    monkeypatch.setattr("data.trajectories.guard._MOST_NAMES", 50)

    def add(group, source):
        for number in range(60):
            group[f"copy-{number}"] = source

    with pytest.raises(FileFault, match="more than the 50 members"):
        open_trajectories(write_changed(tmp_path / "t.h5", lambda run: add(run.parent, run)))
    refused(write_changed(tmp_path / "u.h5", lambda run: add(run, run["lr"])), "run mlp-1", "more than the 50 members")


def test_the_sound_run_beside_a_hostile_one_is_read(tmp_path):
    path = write_changed(tmp_path / "t.h5", lambda run: run.pop("lr"))
    with open_trajectories(path) as file:
        assert file.read("mlp-0").run_id == "mlp-0"

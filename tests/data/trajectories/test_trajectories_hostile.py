"""Shapes, storage, types and filters made to do harm: each is refused, and memory stays small."""

import struct
import zlib

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from data.trajectories.schema import FIELDS
from data.trajectories.trajectory import arrays_of
from tests.data.hostile import put, refused
from tests.data.made import made_trajectory, write_changed, write_raw


@pytest.mark.parametrize(
    ("field", "shape", "chunks", "words"),
    [
        ("weights", (100_000, 4_000, 6_500), (1, 4_000, 6_500), "one chunk"),  # ten terabytes
        ("weights", (5, 3, 80_000), (5, 3, 80_000), "K = 80000"),
        ("weights", (5, 3, 4), (1, 3, 4), "one chunk"),
        ("weights", (1000, 100, 2600), (1000, 100, 2600), "T = 1000"),
        ("weights", (5, 3, 60_000), (5, 3, 60_000), "stores none"),
        ("config", (1 << 21,), (1 << 21,), "bytes = 2097152"),
        ("step", (1 << 20,), (1 << 20,), "T = 1048576"),
    ],
)
def test_a_shape_out_of_all_proportion(tmp_path, field, shape, chunks, words):
    def make(run, name):
        old = {"weights": "<f4", "config": "u1", "step": "<i8"}[name]
        run.create_dataset(name, shape=shape, dtype=old, chunks=chunks, compression="gzip")

    path = write_changed(tmp_path / "t.h5", put(field, make))
    assert path.stat().st_size < 100_000
    refused(path, "run mlp-1", f"field {field}", words)


def test_many_large_fields_are_added_up_before_one_is_read(tmp_path):
    def change(run):
        sizes = {"T": 50_000, "L": 2_000, "K": 1}
        for field in FIELDS:
            if not field.json:
                shape = tuple(sizes[dim] for dim in field.dims)
                del run[field.name]
                run.create_dataset(field.name, shape=shape, dtype=field.dtype, chunks=shape)

    refused(write_changed(tmp_path / "t.h5", change), "field weights", "more than the 1073741824")


def test_nothing_of_a_run_that_is_too_large_is_read(tmp_path, monkeypatch):
    path = write_changed(tmp_path / "t.h5", lambda run: None)
    monkeypatch.setattr("data.trajectories.reader.MOST_RUN_BYTES", 300)
    monkeypatch.setattr("data.trajectories.checks.MOST_RUN_BYTES", 300)
    monkeypatch.setattr("data.trajectories.guard.stored_array", lambda *_: pytest.fail("read"))
    refused(path, "run mlp-1", "field weights", "more than the 300")


def stored(content, shape=(5, 3, 4)):
    """A change that puts `content` into the file as the weights' compressed chunk."""

    def make(run, name):
        dataset = run.create_dataset(name, shape=shape, dtype="<f4", chunks=shape, compression="gzip")
        dataset.id.write_direct_chunk((0,) * len(shape), content)

    return put("weights", make)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stored(zlib.compress(bytes(10**6))), "do not end after the 240 bytes"),
        (stored(zlib.compress(bytes(10**9 // 2))), "stores 4"),  # half a gigabyte in 486 kB
        (stored(zlib.compress(bytes(10**5)), (5, 3, 60_000)), "cannot hold"),
        (stored(zlib.compress(bytes(200))), "200 bytes where its shape needs 240"),
        (stored(b"no deflate"), "compressed data are broken"),
        (stored(zlib.compress(bytes(240))[:-2]), "do not end after"),
    ],
)
def test_compressed_data_that_expand_to_something_else(tmp_path, change, words):
    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", words)


def test_data_that_reach_beyond_the_file(tmp_path):
    runs = {"mlp-1": arrays_of(made_trajectory("mlp-1", snapshots=40))}
    path = write_raw(tmp_path / "t.h5", runs, libver="earliest")  # without HDF5's own checksums
    with h5py.File(path) as file:
        size = file["runs/mlp-1/weights"].id.get_chunk_info(0).size
    content = path.read_bytes()
    key = struct.pack("<II", size, 0)
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, struct.pack("<II", 900_000_000, 0)))
    refused(path, "run mlp-1", "field weights", "beyond the end of the file")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (h5py.string_dtype(), "string"),
        (h5py.vlen_dtype(np.float32), "variable length"),
        (h5py.ref_dtype, "reference"),
        (h5py.regionref_dtype, "reference"),
        (np.dtype([("a", "<f4")]), "compound"),
        (np.dtype(">f4"), "4-byte number"),
        (np.dtype("<f8"), "8-byte number"),
        (np.dtype("<f2"), "2-byte number"),
        (np.dtype("V4"), "4-byte number"),
        (np.dtype("S4"), "string"),
        (h5py.enum_dtype({"A": 1}, "i4"), "4-byte number"),
    ],
)
def test_types_that_the_format_does_not_have(tmp_path, kind, words):
    def make(run, name):
        run.create_dataset(name, shape=(5, 3, 4), dtype=kind, chunks=(5, 3, 4))

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "run mlp-1", "field weights", words)


@pytest.mark.parametrize(
    "options",
    [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 2}, {"shuffle": True, "fletcher32": True}],
)
def test_filters_that_the_format_does_not_use(tmp_path, options):
    def make(run, name):
        run.create_dataset(name, data=np.zeros((5, 3, 4), dtype="<f4"), chunks=(5, 3, 4), **options)

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "field weights", "filters (")


def test_a_filter_twice(tmp_path):
    def make(run, name):
        plan = h5p.create(h5p.DATASET_CREATE)
        plan.set_chunk((5, 3, 4))
        plan.set_deflate(9)
        plan.set_deflate(9)
        h5d.create(run.id, name.encode(), h5t.IEEE_F32LE, h5s.create_simple((5, 3, 4)), plan)

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "field weights", "filters (1, 1)")


def test_a_filter_that_would_load_a_plugin(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "t.h5", {"mlp-1": arrays_of(made_trajectory("mlp-1"))}, libver="earliest")
    with h5py.File(path, "r+") as file:
        run = file["runs/mlp-1"]
        del run["weights"]
        run.create_dataset("weights", data=np.zeros((5, 3, 4), "<f4"), chunks=(5, 3, 4), compression="lzf")
    content = path.read_bytes()
    lzf, unknown = struct.pack("<HH", 32000, 8), struct.pack("<HH", 32015, 8)
    assert content.count(lzf) == 1
    path.write_bytes(content.replace(lzf, unknown))
    refused(path, "run mlp-1", "field weights", "filters (32015,)")


@pytest.mark.parametrize("options", [{}, {"chunks": (5, 3, 4), "maxshape": (None, 3, 4)}])
def test_other_storage(tmp_path, options):
    def make(run, name):
        run.create_dataset(name, data=np.zeros((5, 3, 4), "<f4"), **options)

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "field weights", "chunk")


def test_a_field_without_a_shape(tmp_path):
    change = put("weights", lambda run, name: run.create_dataset(name, data=h5py.Empty("<f4")))
    refused(write_changed(tmp_path / "t.h5", change), "field weights")

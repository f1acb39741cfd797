"""Files that would have other files read. Each is refused, and no other file is opened."""

import h5py
import numpy as np
import pytest
from h5py import h5s

from tests.data.hostile import Watch, put, refused
from tests.data.made import write_changed


@pytest.fixture
def secret(tmp_path):
    """An HDF5 file that nobody may open."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("weights", data=np.zeros((5, 3, 4), dtype="<f4"), maxshape=(None, 3, 4))
    watch = Watch(path)
    yield path
    assert not watch.opened()
    watch.close()


def test_the_watch_sees_what_a_careless_reader_opens(tmp_path):
    (tmp_path / "other.h5").touch()
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["weights"] = 1
    watch = Watch(tmp_path / "secret.h5")
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["weights"] = h5py.ExternalLink("secret.h5", "/weights")
        assert not watch.opened()
        assert file["weights"][()] == 1
    assert watch.opened()
    watch.close()


def test_an_external_link(tmp_path, secret):
    change = put("weights", lambda run, name: run.__setitem__(name, h5py.ExternalLink(str(secret), "/weights")))
    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", "external link")


def test_a_soft_link(tmp_path):
    change = put("weights", lambda run, name: run.__setitem__(name, h5py.SoftLink("/runs/mlp-0/weights")))
    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "field weights", "soft link")


def test_a_run_that_is_an_external_link(tmp_path, secret):
    def change(run):
        runs = run.parent
        del runs["mlp-1"]
        runs["mlp-1"] = h5py.ExternalLink(str(secret), "/")

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "external link")


def test_a_run_that_is_a_soft_link(tmp_path):
    def change(run):
        runs = run.parent
        del runs["mlp-1"]
        runs["mlp-1"] = h5py.SoftLink("/runs/mlp-0")

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "soft link")


@pytest.mark.parametrize(("kind", "word"), [("external", "external link"), ("soft", "soft link")])
def test_all_runs_behind_a_link_higher_up(tmp_path, secret, kind, word):
    def change(run):
        file = run.file
        file.move("runs", "elsewhere")
        file["runs"] = h5py.ExternalLink(str(secret), "/") if kind == "external" else h5py.SoftLink("/elsewhere")

    refused(write_changed(tmp_path / "t.h5", change), word)


def test_a_hard_link_to_another_run(tmp_path):
    def change(run):
        runs = run.parent
        del runs["mlp-1"]
        runs["mlp-1"] = runs["mlp-0"]

    refused(write_changed(tmp_path / "t.h5", change), "run mlp-1", "checksum")


def test_a_hard_link_in_a_circle(tmp_path):
    change = put("weights", lambda run, name: run.__setitem__(name, run.file["/"]))
    refused(write_changed(tmp_path / "t.h5", change), "field weights", "a dataset is expected")


@pytest.mark.parametrize("rows", [5, h5s.UNLIMITED])
def test_a_virtual_dataset(tmp_path, secret, rows):
    """One of unlimited length has its source opened by whoever asks for its shape."""

    def make(run, name):
        most = (None, 3, 4)
        layout = h5py.VirtualLayout((5, 3, 4), "<f4", maxshape=most)
        layout[0:rows, :, :] = h5py.VirtualSource(str(secret), "weights", (5, 3, 4), maxshape=most)[0:rows, :, :]
        run.create_virtual_dataset(name, layout)

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "run mlp-1", "field weights", "virtual dataset")


def test_external_storage(tmp_path, secret):
    def make(run, name):
        run.create_dataset(name, shape=(5, 3, 4), dtype="<f4", external=[(str(secret), 0, 240)])

    refused(write_changed(tmp_path / "t.h5", put("weights", make)), "run mlp-1", "field weights", "external storage")

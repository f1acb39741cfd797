"""Small trajectories and trajectory files, sound ones and others, for the tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.trajectories.schema import FORMAT, FORMAT_VERSION, WRITTEN
from data.trajectories.trajectory import Arrays, Trajectory, arrays_of, checksum


def made_trajectory(
    run_id: str = "mlp-0", *, snapshots: int = 5, layers: int = 3, weights: int = 4, **changes: Any
) -> Trajectory:
    """A finished run whose weights count up, and whose layers reach a similarity of 1 one after the other."""
    shape_TL = (snapshots, layers)
    config = {
        "workload": "mlp",
        "family": "mlp",
        "source": "digits",
        "seed": 0,
        "recipe": {"epochs": 2, "optimizer": "sgd"},
        "sampling": {"weights": weights, "snapshots": max(snapshots - 1, 1), "seed": 0},
        "total_steps": 10 * max(snapshots - 1, 1),
    }
    trajectory = Trajectory(
        run_id=run_id,
        config=config,
        provenance={"versions": {"torch": "2.14.1"}, "hardware": {"device": "cpu"}},
        outcome={
            "status": "finished",
            "final_accuracy": 0.9,
            "final_loss": 0.3,
            "train_seconds": 2.0,
            "cpu_seconds": 2.5,
        },
        layer_names=tuple(f"layers.{index}" for index in range(layers)),
        layer_sizes_L=np.arange(1, layers + 1) * 100,
        step_T=np.arange(snapshots) * 10,
        lr_T=np.linspace(0.1, 0.0, snapshots),
        loss_T=np.linspace(2, 1, snapshots, dtype=np.float32),
        seconds_T=np.arange(snapshots) * 0.5,
        weights_TLK=np.arange(snapshots * layers * weights, dtype=np.float32).reshape(snapshots, layers, weights),
        gradient_norm_TL=np.ones(shape_TL, dtype=np.float32),
        similarity_TL=(np.arange(snapshots)[:, None] >= np.arange(layers)[None]).astype(np.float32),
    )
    return replace(trajectory, **changes)


def assert_same(one: Trajectory, other: Trajectory) -> None:
    for name in ("run_id", "config", "provenance", "outcome", "layer_names"):
        assert getattr(one, name) == getattr(other, name), name
    for field in WRITTEN:
        if not field.json:
            mine, theirs = getattr(one, field.attribute), getattr(other, field.attribute)
            assert mine.dtype == theirs.dtype == np.dtype(field.dtype)
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)


def write_raw(path: Path, runs: dict[str, Arrays], *, version: int = FORMAT_VERSION, libver: str = "v110") -> Path:
    """Write arrays past every check of the writer, with checksums that are right."""
    with h5py.File(path, "w", libver=(libver, "v110")) as file:
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["version"] = np.int64(version)
        group = file.create_group("runs")
        for run_id, arrays in runs.items():
            run = group.create_group(run_id)
            for name, array in arrays.items():
                run.create_dataset(name, data=array, chunks=array.shape, compression="gzip", shuffle=True)
            run.attrs["sha256"] = np.bytes_(checksum(run_id, arrays))
    return path


def write_changed(path: Path, change: Callable[[h5py.Group], None]) -> Path:
    """A file of the runs mlp-0 (sound) and mlp-1, after `change` was at work on mlp-1's group."""
    write_raw(path, {run_id: arrays_of(made_trajectory(run_id)) for run_id in ("mlp-0", "mlp-1")})
    with h5py.File(path, "r+") as file:
        change(file["runs/mlp-1"])
    return path


def write_arrays(path: Path, **changes: Any) -> Path:
    """A file of one run, mlp-1, some of whose arrays are others than its trajectory's."""
    return write_raw(path, {"mlp-1": {**arrays_of(made_trajectory("mlp-1")), **changes}})

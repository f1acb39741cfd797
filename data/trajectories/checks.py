"""What a trajectory must be, beyond its shapes: the writer refuses anything else, the reader reports it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data.trajectories.schema import FIELDS, MOST, MOST_RUN_BYTES
from data.trajectories.trajectory import Trajectory

_CONFIG: dict[str, type] = {
    "workload": str,
    "family": str,
    "source": str,
    "seed": int,
    "recipe": dict,
    "sampling": dict,
    "total_steps": int,
}
_MOST_STEPS = 1 << 53  # beyond it, floating-point progress loses count
_STATUSES = ("finished", "diverged")

Faults = Iterator[tuple[str, str]]
"""Pairs of a field's name and what is wrong with it."""


def shape_faults(shapes: Mapping[str, tuple[int, ...]]) -> Faults:
    """Shapes, by their fields' names, that break a cap or disagree about a dimension."""
    known: dict[str, tuple[str, int]] = {}
    for field in FIELDS:
        if field.name not in shapes:
            continue
        shape = shapes[field.name]
        if len(shape) != len(field.dims):
            yield field.name, f"{len(shape)} dimensions where {len(field.dims)} are expected ({', '.join(field.dims)})"
            continue
        for dim, size in zip(field.dims, shape, strict=True):
            if not 1 <= size <= MOST[dim]:
                yield field.name, f"{dim} = {size} is not between 1 and {MOST[dim]}"
            elif dim != "bytes" and known.setdefault(dim, (field.name, size))[1] != size:
                yield field.name, f"{dim} = {size} where {known[dim][0]} has {dim} = {known[dim][1]}"
    if total_bytes(shapes) > MOST_RUN_BYTES:
        yield "weights", f"the run takes {total_bytes(shapes)} bytes, more than the {MOST_RUN_BYTES} that one may hold"


def total_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What fields of these shapes take in memory."""
    return sum(math.prod(shapes[field.name]) * field.item_bytes for field in FIELDS if field.name in shapes)


def content_faults(trajectory: Trajectory) -> Faults:
    """Values that a run cannot leave behind. The shapes must be right already."""
    yield from _config_faults(trajectory.config, trajectory.weights_TLK.shape[2])
    yield from _outcome_faults(trajectory.outcome)
    if len(trajectory.layer_names) != len(trajectory.layer_sizes_L):
        yield "layer_names", f"{len(trajectory.layer_names)} names for {len(trajectory.layer_sizes_L)} layers"
    if len(set(trajectory.layer_names)) < len(trajectory.layer_names):
        yield "layer_names", "a name stands for two layers"
    yield from _series_faults(trajectory)


def _config_faults(config: dict[str, Any], sampled: int) -> Faults:
    for name, kind in _CONFIG.items():
        if not isinstance(config.get(name), kind):
            yield "config", f"{name!r} is {config.get(name)!r:.60}, not of type {kind.__name__}"
    sampling = config.get("sampling")
    if isinstance(sampling, dict):
        for name in ("weights", "snapshots", "seed"):
            if not isinstance(sampling.get(name), int):
                yield "config", f"sampling: {name!r} is {sampling.get(name)!r:.60}, not of type int"
        if sampling.get("weights") != sampled:
            yield "weights", f"K = {sampled} where config samples {sampling.get('weights')!r:.60} weights a layer"


def _outcome_faults(outcome: dict[str, Any]) -> Faults:
    status = outcome.get("status")
    if status not in _STATUSES:
        yield "outcome", f"status {status!r:.60} is none of {', '.join(_STATUSES)}"
    for name in ("final_accuracy", "final_loss", "train_seconds", "cpu_seconds"):
        value = outcome.get(name)
        if value is None and status == "diverged":
            continue
        if not isinstance(value, int | float):
            yield "outcome", f"{name!r} is {value!r:.60}, not a number"
        elif name != "final_loss" and not 0 <= value <= (1 if name == "final_accuracy" else math.inf):
            yield "outcome", f"{name!r} is {value!r:.60}, out of its range"


def _series_faults(trajectory: Trajectory) -> Faults:
    last, total = int(trajectory.step_T[-1]), trajectory.config.get("total_steps")
    if trajectory.step_T[0] < 0 or (np.diff(trajectory.step_T) <= 0).any():
        yield "step", "steps do not grow from snapshot to snapshot"
    if isinstance(total, int) and not 1 <= total <= _MOST_STEPS:
        yield "config", f"total_steps = {total!r:.60} is not between 1 and {_MOST_STEPS}"
    elif isinstance(total, int) and last > total:
        yield "step", f"the last snapshot is at step {last}, after the run's {total} steps"
    if (trajectory.layer_sizes_L < 1).any():
        yield "layer_sizes", "a layer without weights"
    if not (np.isfinite(trajectory.lr_T) & (trajectory.lr_T >= 0)).all():
        yield "lr", "a learning rate that is negative or not finite"
    if not np.isfinite(trajectory.seconds_T).all() or (np.diff(trajectory.seconds_T, prepend=0.0) < 0).any():
        yield "seconds", "time that is not finite, or runs backwards"
    if trajectory.finished and not np.isfinite(trajectory.weights_TLK).all():
        yield "weights", "weights that are not finite in a run that finished"
    for name in ("gradient_norm", "update_norm"):
        if (getattr(trajectory, f"{name}_TL") < 0).any():
            yield name, "a negative norm"
    if np.isinf(trajectory.similarity_TL).any():
        yield "similarity", "an infinite similarity"

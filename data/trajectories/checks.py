"""What a trajectory must be beyond its shapes. The writer refuses anything else, and the reader reports it."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from data.trajectories.schema import FIELDS, MOST, MOST_RUN_BYTES
from data.trajectories.trajectory import Trajectory
from data.validation import faults_of

_MOST_STEPS = 1 << 53  # beyond it, floating-point progress loses count

Faults = Iterator[tuple[str, str]]
"""Pairs of a field's name and what is wrong with it."""


class _Sampling(BaseModel):
    weights: int
    snapshots: int
    seed: int


class _Config(BaseModel):
    """The keys of a run's configuration that readers rely on. There may be others."""

    workload: str
    family: str
    source: str
    seed: int
    recipe: dict[str, Any]
    sampling: _Sampling
    total_steps: Annotated[int, Field(ge=1, le=_MOST_STEPS)]


class _Outcome(BaseModel):
    """How a run ended. One that diverged may lack the numbers.

    Accuracy and loss may be null in a run that finished: not every training of one's own knows them.
    """

    status: Literal["finished", "diverged"]
    final_accuracy: Annotated[float | None, Field(ge=0, le=1)] = None
    final_loss: Annotated[float | None, Field(allow_inf_nan=False)] = None
    train_seconds: Annotated[float | None, Field(ge=0)] = None
    cpu_seconds: Annotated[float | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _complete(self) -> "_Outcome":
        known = self.model_fields_set & {"final_accuracy", "final_loss"}
        missing = [name for name, value in self if value is None and name not in known]
        if self.status == "finished" and missing:
            raise ValueError(f"{', '.join(missing)}: missing in a run that finished")
        return self


def shape_faults(shapes: Mapping[str, tuple[int, ...]]) -> Faults:
    """Shapes, by the names of their fields, that exceed a limit or disagree about a dimension."""
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
        yield "weights", f"the run takes {total_bytes(shapes)} bytes, more than the limit of {MOST_RUN_BYTES}"


def total_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The memory that fields of these shapes take."""
    return sum(math.prod(shapes[field.name]) * field.item_bytes for field in FIELDS if field.name in shapes)


def content_faults(trajectory: Trajectory) -> Faults:
    """Values that no run leaves behind. The shapes must be right already."""
    broken = faults_of(_Config, trajectory.config)
    yield from (("config", what) for what in broken)
    yield from (("outcome", what) for what in faults_of(_Outcome, trajectory.outcome))
    if len(trajectory.layer_names) != len(trajectory.layer_sizes_L):
        yield "layer_names", f"{len(trajectory.layer_names)} names for {len(trajectory.layer_sizes_L)} layers"
    if len(set(trajectory.layer_names)) < len(trajectory.layer_names):
        yield "layer_names", "two layers have the same name"
    yield from _array_faults(trajectory)
    if not broken:
        yield from _misfits(trajectory)


def _array_faults(trajectory: Trajectory) -> Faults:
    if trajectory.step_T[0] < 0 or (np.diff(trajectory.step_T) <= 0).any():
        yield "step", "steps do not grow from snapshot to snapshot"
    if (trajectory.layer_sizes_L < 1).any():
        yield "layer_sizes", "a layer without weights"
    if not (np.isfinite(trajectory.lr_T) & (trajectory.lr_T >= 0)).all():
        yield "lr", "a learning rate that is negative or not finite"
    if not np.isfinite(trajectory.seconds_T).all() or (np.diff(trajectory.seconds_T, prepend=0.0) < 0).any():
        yield "seconds", "time that is not finite, or runs backwards"
    if trajectory.finished and not np.isfinite(trajectory.weights_TLK).all():
        yield "weights", "weights that are not finite in a run that finished"
    if (trajectory.gradient_norm_TL < 0).any():
        yield "gradient_norm", "a negative norm"
    if np.isinf(trajectory.similarity_TL).any():
        yield "similarity", "an infinite similarity"


def _misfits(trajectory: Trajectory) -> Faults:
    """Arrays that do not fit the configuration."""
    config, sampled, last = trajectory.config, trajectory.weights_TLK.shape[2], int(trajectory.step_T[-1])
    if config["sampling"]["weights"] != sampled:
        yield "weights", f"K = {sampled} where config samples {config['sampling']['weights']} weights a layer"
    if last > config["total_steps"]:
        yield "step", f"the last snapshot is at step {last}, after the run's {config['total_steps']} steps"

"""Writes trajectory files, whole or not at all, also when the disk fills up."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.trajectories.checks import content_faults, shape_faults
from data.trajectories.reader import TrajectoryFile
from data.trajectories.schema import FIELDS, FORMAT, FORMAT_VERSION, WRITTEN, is_run_id
from data.trajectories.trajectory import Arrays, Trajectory, arrays_of, checksum
from predictor.errors import UsageError
from predictor.shared.files import written_whole


def write_runs(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write runs, taken one by one, as one file. An older file stays until the new one is complete and on the disk.

    Raises:
        UsageError: A reader would refuse a run, a run comes twice, or there is none.
        FileFault: The disk is full, or the path cannot be written to.
    """
    with written_whole(Path(path)) as part, new_file(part) as runs:
        for trajectory in trajectories:
            runs.add(trajectory)
        if not len(runs):
            raise UsageError(f"{path}: no runs to write: a trajectory file holds at least one")


class NewRuns:
    """The runs of a file that is being written."""

    def __init__(self, group: h5py.Group, output: "_Output") -> None:
        self._group = group
        self._output = output

    def add(self, trajectory: Trajectory) -> None:
        """Write one run."""
        arrays = _checked(trajectory)
        if trajectory.run_id in self:
            raise UsageError(f"run {trajectory.run_id}: twice in one file: give each run an id of its own")
        run = self._group.create_group(trajectory.run_id)
        for field in WRITTEN:
            array = arrays[field.name]
            run.create_dataset(field.name, data=array, **_options(array.shape))
        run.attrs["sha256"] = np.bytes_(checksum(trajectory.run_id, arrays))
        self._output.check()

    def copy(self, source: TrajectoryFile, run_id: str) -> None:
        """Copy one run from a file, as it is stored. Let `source` read it first to know that it is sound."""
        stored = source.stored(run_id)
        run = self._group.create_group(run_id)
        for field in (field for field in FIELDS if field.name in stored.chunks):
            shape, mask, raw = stored.chunks[field.name]
            dataset = run.create_dataset(field.name, shape, field.dtype, **_options(shape))
            dataset.id.write_direct_chunk((0,) * len(shape), raw, mask)
        run.attrs["sha256"] = np.bytes_(stored.sha256)
        self._output.check()

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._group

    def __len__(self) -> int:
        return len(self._group)


@contextmanager
def new_file(path: Path) -> Iterator[NewRuns]:
    """Start a trajectory file. A kill leaves it unreadable, so use it inside `written_whole`."""
    with _Output(path) as output:
        try:
            # HDF5 1.10 put checksums on its own structures, and every HDF5 since then reads it.
            with h5py.File(output, "w", libver=("v110", "v110")) as file:
                file.attrs["format"] = np.bytes_(FORMAT)
                file.attrs["version"] = np.int64(FORMAT_VERSION)
                yield NewRuns(file.create_group("runs"), output)
        except BaseException:
            output.check()  # the disk's own error, rather than what HDF5 makes of it
            raise
        output.check()


def _options(shape: tuple[int, ...]) -> dict[str, Any]:
    """One chunk a field: it is read whole, and a reader can check its size before it reads."""
    return {"chunks": shape, "compression": "gzip", "compression_opts": 4, "shuffle": True}


class _Output(io.FileIO):
    """The file below HDF5. It keeps the first error until `check`, and drops what is written after it.

    HDF5 itself must not see an error. When the disk is full it fails again while closing, where h5py cannot raise, and
    ends the process with a segmentation fault (HDF5 2.0).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error

    def readinto(self, buffer: Any) -> int:
        return self._try(super().readinto, buffer)

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        end = self.tell() + len(left)
        while left and not self._error:
            left = left[self._try(os.write, self.fileno(), left) :]
        self.seek(end)
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        self._try(super().truncate, size)
        return size or 0

    def _try(self, call: Callable[..., int | None], *arguments: Any) -> int:
        try:
            return call(*arguments) or 0
        except BaseException as error:  # Ctrl-C too: this runs below HDF5
            self._error = self._error or error
            return 0


def _checked(trajectory: Trajectory) -> Arrays:
    """A trajectory's arrays. Raises UsageError where a reader would refuse them."""
    if not is_run_id(trajectory.run_id):
        raise UsageError(f"run_id={trajectory.run_id!r}: give up to 100 letters, digits, `.`, `_` and `-`")
    try:
        arrays = arrays_of(trajectory)
    except (TypeError, ValueError) as error:
        raise UsageError(f"run {trajectory.run_id}: {error}: give numbers, text, lists and dicts") from error
    faults = list(shape_faults({name: array.shape for name, array in arrays.items()}))
    faults = faults or list(content_faults(trajectory))
    if faults:
        listed = "; ".join(f"{name}: {what}" for name, what in faults)
        raise UsageError(f"run {trajectory.run_id}: cannot be written: {listed}")
    return arrays

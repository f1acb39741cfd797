"""Reads trajectory files, one run at a time. Nothing in a file is trusted."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from data.trajectories.checks import content_faults
from data.trajectories.child import Answer, ask
from data.trajectories.guard import Chunk, Location
from data.trajectories.schema import FIELDS, WRITTEN, Field
from data.trajectories.trajectory import Arrays, Trajectory, checksum, parsed, trajectory_of
from predictor.errors import FileFault, UsageError

_NOT_DEFLATED = 0b10
"""Filter mask of a chunk that deflate would have made larger: HDF5 stores it shuffled only."""


def open_trajectories(path: Path) -> "TrajectoryFile":
    """Open a trajectory file, as a context manager. Raises FileFault where it is not a sound one."""
    file = TrajectoryFile(path)
    if file.faults:
        raise file.faults[0]
    return file


class TrajectoryFile:
    """A trajectory file. Iterating over it reads its runs one by one, in the order of their ids."""

    def __init__(self, path: Path) -> None:
        """Look into the file. `faults` keeps what is wrong beside the runs, and stops no run from being read."""
        self.path = Path(path)
        found = ask(self.path)
        self.faults, self.version, self.run_ids = found.faults, found.version, tuple(found.run_ids)
        self._known = frozenset(self.run_ids)

    def read(self, run_id: str) -> Trajectory:
        """Read one run, with its shapes, values and checksum verified.

        Raises:
            FileFault: The run is not sound. It is a DamagedFile where reading again cannot help.
            UsageError: The file holds no such run.
        """
        trajectory, faults = self.examine(run_id)
        if trajectory is None or faults:
            raise faults[0]
        return trajectory

    def examine(self, run_id: str) -> tuple[Trajectory | None, list[FileFault]]:
        """One run and everything that is wrong with it. The trajectory is None when a field cannot be read."""
        try:
            stored = self.stored(run_id)
        except FileFault as fault:
            return None, [fault]
        location, faults = Location(self.path, run_id), list(stored.faults)
        arrays: Arrays = {}
        parts: dict[str, Any] = {}
        for field in (field for field in FIELDS if field.name in stored.chunks):
            at = location.at(field=field.name)
            try:
                arrays[field.name] = _decoded(at, stored.chunks[field.name], field)
                if field.json:
                    parts[field.name] = parsed(field.name, arrays[field.name])
            except FileFault as fault:
                faults.append(fault)
            except ValueError as error:
                faults.append(at.damaged(str(error)))
        if any(field.name not in arrays for field in WRITTEN):
            return None, faults
        if stored.sha256 != checksum(run_id, arrays):
            faults.append(location.damaged("its content does not match its checksum"))
        if any(field.name not in parts for field in WRITTEN if field.json):
            return None, faults
        trajectory = trajectory_of(run_id, arrays, parts)
        faults += [location.at(field=name).damaged(what) for name, what in content_faults(trajectory)]
        return trajectory, faults

    def stored(self, run_id: str) -> Answer:
        """One run as it is stored, for a copy. Read it first to know that it is sound."""
        if run_id not in self._known:
            raise UsageError(f"{self.path}: holds no run {run_id!r}: see `python -m data inspect {self.path}`")
        return ask(self.path, run_id)

    def checksum(self, run_id: str) -> str:
        """The checksum that is stored with a run."""
        return self.stored(run_id).sha256

    def close(self) -> None:
        """Do nothing: no file is kept open."""

    def __enter__(self) -> "TrajectoryFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.run_ids)

    def __iter__(self) -> Iterator[Trajectory]:
        return map(self.read, self.run_ids)


def _decoded(location: Location, chunk: Chunk, field: Field) -> npt.NDArray[Any]:
    """The values of a chunk. Memory is bounded by the declared size, whatever the bytes would expand to."""
    raw, size = chunk.raw, int(np.prod(chunk.shape, dtype=np.int64)) * field.item_bytes
    if chunk.mask != _NOT_DEFLATED:
        try:
            raw = zlib.decompressobj().decompress(raw, size + 1)
        except zlib.error as error:
            raise location.damaged(f"its compressed data are broken ({error})") from None
    if len(raw) != size:
        raise location.damaged(f"{len(raw)} bytes or more where its shape needs {size}")
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(field.item_bytes, -1)
    values: npt.NDArray[Any] = planes.T.copy().view(field.dtype).reshape(chunk.shape)
    return values

"""Reads trajectory files, one run at a time. Nothing in a file is trusted."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from h5py import h5d, h5g, h5o

from data.trajectories import guard
from data.trajectories.checks import content_faults, shape_faults, total_bytes
from data.trajectories.guard import Location
from data.trajectories.schema import (
    FIELDS,
    FORMAT,
    FORMAT_VERSION,
    MOST_RUN_BYTES,
    MOST_RUNS,
    READABLE_VERSIONS,
    WRITTEN,
    is_run_id,
)
from data.trajectories.trajectory import Arrays, Trajectory, checksum, parsed, trajectory_of
from predictor.errors import DamagedFile, FileFault, UsageError

_FIELDS = {field.name: field for field in FIELDS}
_NEEDED = {field.name for field in WRITTEN}
_MOST_NAMES = 1_000
"""How many members of a run are listed, surplus ones included."""


def open_trajectories(path: Path) -> "TrajectoryFile":
    """Open a trajectory file, as a context manager. Raises FileFault where it is not a sound one."""
    file = TrajectoryFile(path)
    if file.faults:
        file.close()
        raise file.faults[0]
    return file


class TrajectoryFile:
    """A trajectory file opened for reading. Iterating over it reads its runs one by one, in the order of their ids."""

    def __init__(self, path: Path) -> None:
        """Open the file. `faults` keeps what is wrong with its outermost part, and stops no run from being read."""
        self.path = Path(path)
        self.faults: list[FileFault] = []
        self._location = Location(self.path)
        self._file = guard.open_file(self._location)
        try:
            self.version = self._checked_version()
            self._runs, self.run_ids = self._open_runs()
        except BaseException:
            self.close()
            raise
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
            location, group = self._open_run(run_id)
            found = {name.decode("utf-8", "replace") for name in guard.names(location, group, _MOST_NAMES)}
        except FileFault as fault:
            return None, [fault]
        arrays, faults = _read_fields(location, group, found)
        faults += [location.at(field=name).damaged("missing") for name in sorted(_NEEDED - found)]
        faults += [
            location.at(field=name).hostile("the format has no such field") for name in sorted(found - _FIELDS.keys())
        ]
        parts, broken = _parse(location, arrays)
        faults += broken
        if not arrays.keys() >= _NEEDED:
            return None, faults
        faults += _checksum_faults(location, group, arrays)
        if broken:
            return None, faults
        trajectory = trajectory_of(run_id, arrays, parts)
        faults += [location.at(field=name).damaged(what) for name, what in content_faults(trajectory)]
        return trajectory, faults

    def copy_run(self, run_id: str, target: Any) -> None:
        """Copy one run, as it is stored, into an HDF5 group of another file. Read it first to know that it is sound."""
        location, _ = self._open_run(run_id)
        with location.reading():
            h5o.copy(self._runs, run_id.encode(), target.id, run_id.encode())

    def checksum(self, run_id: str) -> str:
        """The checksum that is stored with a run."""
        location, group = self._open_run(run_id)
        return str(guard.attribute(location, group, "sha256"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

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

    def _checked_version(self) -> int:
        location = self._location
        with location.reading():
            self._root = root = h5g.open(self._file.id, b"/")
        if guard.attribute(location, root, "format") != FORMAT:
            raise FileFault(f"{self.path}: an HDF5 file without trajectories: name one that gather or merge wrote")
        version = guard.attribute(location, root, "version")
        if version not in READABLE_VERSIONS:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            kind, cure = (FileFault, "update the toolkit") if newer else (DamagedFile, "gather it again")
            raise kind(f"{self.path}: format version {version}, but this toolkit reads 1 to {FORMAT_VERSION}: {cure}")
        return int(version)

    def _open_runs(self) -> tuple[h5g.GroupID, tuple[str, ...]]:
        location, root = self._location, self._root
        self._note(lambda: guard.check_attributes(location, root, 2))
        for name in guard.names(location, root, _MOST_NAMES):
            if name != b"runs":
                self.faults.append(location.hostile(f"{name!r:.60} is beside the runs"))
        runs = guard.open_member(location, root, "runs", h5g.GroupID)
        self._note(lambda: guard.check_attributes(location, runs, 0))
        return runs, tuple(self._names_of_runs(runs))

    def _names_of_runs(self, runs: h5g.GroupID) -> Iterator[str]:
        for raw in sorted(guard.names(self._location, runs, MOST_RUNS)):
            name = raw.decode("utf-8", "replace")
            if is_run_id(name):
                yield name
            else:
                self.faults.append(
                    self._location.at(run=name).hostile("a run's id is up to 100 letters, digits, . _ and -")
                )

    def _note(self, check: Any) -> None:
        try:
            check()
        except FileFault as fault:
            self.faults.append(fault)

    def _open_run(self, run_id: str) -> tuple[Location, h5g.GroupID]:
        if run_id not in self._known:
            raise UsageError(f"{self.path}: holds no run {run_id!r}: see `python -m data inspect {self.path}`")
        location = self._location.at(run=run_id)
        return location, guard.open_member(location, self._runs, run_id, h5g.GroupID)


def _read_fields(location: Location, group: h5g.GroupID, found: set[str]) -> tuple[Arrays, list[FileFault]]:
    """A run's arrays, and what is wrong with the others. Everything declared is checked before a byte is read."""
    datasets: dict[str, h5d.DatasetID] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    faults: list[FileFault] = []
    for name in (name for name in _FIELDS if name in found):
        at = location.at(field=name)
        try:
            datasets[name] = guard.open_member(at, group, name, h5d.DatasetID)
            shapes[name] = guard.declared_shape(at, datasets[name], _FIELDS[name])
        except FileFault as fault:
            faults.append(fault)
    wrong = list(shape_faults(shapes))
    faults += [location.at(field=name).hostile(what) for name, what in wrong]
    if total_bytes(shapes) > MOST_RUN_BYTES:
        return {}, faults
    arrays: Arrays = {}
    for name in (name for name in shapes if name not in dict(wrong)):
        at = location.at(field=name)
        try:
            arrays[name] = guard.stored_array(at, datasets[name], _FIELDS[name], shapes[name])
        except FileFault as fault:
            faults.append(fault)
    return arrays, faults


def _parse(location: Location, arrays: Arrays) -> tuple[dict[str, Any], list[FileFault]]:
    """The content of the JSON parts, and what is wrong with the others."""
    parts: dict[str, Any] = {}
    faults: list[FileFault] = []
    for name in arrays:
        if _FIELDS[name].json:
            try:
                parts[name] = parsed(name, arrays[name])
            except ValueError as error:
                faults.append(location.at(field=name).damaged(str(error)))
    return parts, faults


def _checksum_faults(location: Location, group: h5g.GroupID, arrays: Arrays) -> list[FileFault]:
    try:
        guard.check_attributes(location, group, 1)
        if guard.attribute(location, group, "sha256") != checksum(location.run, arrays):
            raise location.damaged("its content does not match its checksum")
    except FileFault as fault:
        return [fault]
    return []

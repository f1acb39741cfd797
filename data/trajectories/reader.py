"""Reads trajectory files, one run at a time, and trusts nothing in them."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from h5py import h5d, h5g, h5o

from data.trajectories import guard
from data.trajectories.checks import content_faults, shape_faults, total_bytes
from data.trajectories.guard import Place
from data.trajectories.schema import FIELDS, FORMAT, FORMAT_VERSION, MOST_RUN_BYTES, MOST_RUNS, is_run_id
from data.trajectories.trajectory import Arrays, Trajectory, checksum, parsed, trajectory_of
from predictor.errors import DamagedFile, FileFault, UsageError

_FIELDS = {field.name: field for field in FIELDS}
_MOST_NAMES = 1_000
"""How far a run's members are listed, all the surplus ones among them."""


def open_trajectories(path: Path) -> "TrajectoryFile":
    """Open a trajectory file, as a context manager. Raises FileFault when it is none, or not a sound one."""
    file = TrajectoryFile(path)
    if file.faults:
        file.close()
        raise file.faults[0]
    return file


class TrajectoryFile:
    """A trajectory file opened for reading. Iterating over it reads its runs one by one, in the order of their ids."""

    def __init__(self, path: Path) -> None:
        """Look at the file's outermost part; `faults` keeps what is wrong there but stops no run from being read."""
        self.path = Path(path)
        self.faults: list[FileFault] = []
        self._place = Place(self.path)
        self._file = guard.open_file(self._place)
        try:
            self._runs, self.run_ids = self._open_runs()
        except BaseException:
            self.close()
            raise
        self._known = frozenset(self.run_ids)

    def read(self, run_id: str) -> Trajectory:
        """One run, whole: its shapes, values and checksum have been verified.

        Raises FileFault, and of those DamagedFile where reading again cannot help.
        """
        trajectory, faults = self.examine(run_id)
        if trajectory is None or faults:
            raise faults[0]
        return trajectory

    def examine(self, run_id: str) -> tuple[Trajectory | None, list[FileFault]]:
        """One run and everything that is wrong with it; there is no trajectory when a field cannot be read."""
        try:
            place, group = self._open_run(run_id)
            found = {name.decode("utf-8", "replace") for name in guard.names(place, group, _MOST_NAMES)}
        except FileFault as fault:
            return None, [fault]
        arrays, faults = _read_fields(place, group, found)
        faults += [
            place.at(field=name).hostile("the format has no such field") for name in sorted(found - set(_FIELDS))
        ]
        parts, broken = _parse(place, arrays)
        faults += broken
        if len(arrays) < len(_FIELDS):
            return None, faults
        faults += _checksum_faults(place, group, arrays)
        if broken:
            return None, faults
        trajectory = trajectory_of(run_id, arrays, parts)
        faults += [place.at(field=name).damaged(what) for name, what in content_faults(trajectory)]
        return trajectory, faults

    def config(self, run_id: str) -> dict[str, Any]:
        """One run's configuration, without the rest of the run; the checksum is verified by `read` alone."""
        place, group = self._open_run(run_id)
        arrays, faults = _read_fields(place, group, {"config"}, wanted=("config",))
        parts, more = _parse(place, arrays)
        if faults or more:
            raise (faults + more)[0]
        config: dict[str, Any] = parts["config"]
        return config

    def configs(self) -> Mapping[str, dict[str, Any]]:
        """Every run's configuration by its id, each read when it is asked for."""
        return _Configs(self)

    def copy_run(self, run_id: str, target: Any) -> None:
        """Copy one run, as it is stored, into an HDF5 group of another file. Only what was `read` is sound."""
        place, _ = self._open_run(run_id)
        with place.reading():
            h5o.copy(self._runs, run_id.encode(), target.id, run_id.encode())

    def checksum(self, run_id: str) -> str:
        """The checksum that is stored with a run."""
        place, group = self._open_run(run_id)
        return str(guard.attribute(place, group, "sha256"))

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

    def _open_runs(self) -> tuple[h5g.GroupID, tuple[str, ...]]:
        place, root = self._place, self._file.id
        with place.reading():
            root = h5g.open(root, b"/")
        if guard.attribute(place, root, "format") != FORMAT:
            raise FileFault(f"{self.path}: an HDF5 file, but not of trajectories: name one that gather or merge wrote")
        version = guard.attribute(place, root, "version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            kind, cure = (FileFault, "update the toolkit") if newer else (DamagedFile, "gather it again")
            raise kind(f"{self.path}: format version {version}, but this toolkit reads {FORMAT_VERSION}: {cure}")
        self._note(lambda: guard.check_attributes(place, root, 2))
        for name in guard.names(place, root, _MOST_NAMES):
            if name != b"runs":
                self.faults.append(place.hostile(f"{name!r:.60} lies beside the runs"))
        runs = guard.open_member(place, root, "runs", h5g.GroupID)
        self._note(lambda: guard.check_attributes(place, runs, 0))
        return runs, tuple(self._names_of_runs(runs))

    def _names_of_runs(self, runs: h5g.GroupID) -> Iterator[str]:
        for raw in sorted(guard.names(self._place, runs, MOST_RUNS)):
            name = raw.decode("utf-8", "replace")
            if is_run_id(name):
                yield name
            else:
                self.faults.append(
                    self._place.at(run=name).hostile("a run's id is up to 100 letters, digits, . _ and -")
                )

    def _note(self, check: Any) -> None:
        try:
            check()
        except FileFault as fault:
            self.faults.append(fault)

    def _open_run(self, run_id: str) -> tuple[Place, h5g.GroupID]:
        if run_id not in self._known:
            raise UsageError(f"{self.path}: holds no run {run_id!r}: see `python -m data inspect {self.path}`")
        place = self._place.at(run=run_id)
        return place, guard.open_member(place, self._runs, run_id, h5g.GroupID)


class _Configs(Mapping[str, dict[str, Any]]):
    def __init__(self, file: TrajectoryFile) -> None:
        self._file = file

    def __getitem__(self, run_id: str) -> dict[str, Any]:
        return self._file.config(run_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.run_ids)

    def __len__(self) -> int:
        return len(self._file)

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._file.run_ids


def _read_fields(
    place: Place, group: h5g.GroupID, found: set[str], wanted: Collection[str] = tuple(_FIELDS)
) -> tuple[Arrays, list[FileFault]]:
    """A run's arrays, and what is wrong with the others. All that is declared is judged before a byte is read."""
    datasets: dict[str, h5d.DatasetID] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    faults: list[FileFault] = []
    for name in wanted:
        at = place.at(field=name)
        try:
            if name not in found:
                raise at.damaged("missing")
            datasets[name] = guard.open_member(at, group, name, h5d.DatasetID)
            shapes[name] = guard.declared_shape(at, datasets[name], _FIELDS[name])
        except FileFault as fault:
            faults.append(fault)
    wrong = list(shape_faults(shapes))
    faults += [place.at(field=name).hostile(what) for name, what in wrong]
    if total_bytes(shapes) > MOST_RUN_BYTES:
        return {}, faults
    arrays: Arrays = {}
    for name in (name for name in shapes if name not in dict(wrong)):
        at = place.at(field=name)
        try:
            arrays[name] = guard.stored_array(at, datasets[name], _FIELDS[name], shapes[name])
        except FileFault as fault:
            faults.append(fault)
    return arrays, faults


def _parse(place: Place, arrays: Arrays) -> tuple[dict[str, Any], list[FileFault]]:
    """The content of the JSON parts, and what is wrong with those that are none."""
    parts: dict[str, Any] = {}
    faults: list[FileFault] = []
    for name in arrays:
        if _FIELDS[name].json:
            try:
                parts[name] = parsed(name, arrays[name])
            except ValueError as error:
                faults.append(place.at(field=name).damaged(str(error)))
    return parts, faults


def _checksum_faults(place: Place, group: h5g.GroupID, arrays: Arrays) -> list[FileFault]:
    try:
        guard.check_attributes(place, group, 1)
        if guard.attribute(place, group, "sha256") != checksum(place.run, arrays):
            raise place.damaged("its content is not what its checksum was made of")
    except FileFault as fault:
        return [fault]
    return []

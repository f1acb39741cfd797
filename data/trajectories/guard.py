"""Looks into an untrusted HDF5 file: what the format does not use is refused before it is followed.

HDF5 lets a file have other files read, load plugins and ask for any amount of memory. So only hard links are opened.
The storage, type, filters and size that a dataset declares are checked before its data are read. Its one chunk is then
fetched as stored, because HDF5 would inflate it far beyond the declared size. All of this runs in the child process.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from data.trajectories.checks import shape_faults, total_bytes
from data.trajectories.schema import (
    FIELDS,
    FORMAT,
    FORMAT_VERSION,
    MOST_RUN_BYTES,
    MOST_RUNS,
    READABLE_VERSIONS,
    Field,
    is_run_id,
)
from predictor.errors import DamagedFile, FileFault

_DAMAGED = "copy it again, or make it with `python -m collect gather trajectories`"
_HOSTILE = "no file of this toolkit holds that; do not use it, and get it again from its author"
_UNREADABLE = "make it readable for this user, or try again when the machine can read it"
_TYPES = {"|u1": h5t.STD_U8LE, "<i8": h5t.STD_I64LE, "<f4": h5t.IEEE_F32LE, "<f8": h5t.IEEE_F64LE}
_FILTERS = (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE)
_MOST_NAMES = 1_000
"""How many members of a run are listed, surplus ones included."""
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}


class Chunk(NamedTuple):
    """A field as it is stored: shuffled and deflated, but for a filter whose bit is set in the mask."""

    shape: tuple[int, ...]
    mask: int
    raw: bytes


@dataclass(frozen=True)
class Location:
    """A file, a run in it and a field of that run, as every fault names them."""

    path: Path
    run: str = ""
    field: str = ""

    def at(self, run: str = "", field: str = "") -> "Location":
        """A location further in."""
        return replace(self, run=run or self.run, field=field)

    def damaged(self, what: str) -> DamagedFile:
        """A fault that a broken disk or an interrupted copy leaves."""
        return DamagedFile(self._message(what, _DAMAGED))

    def hostile(self, what: str) -> FileFault:
        """A fault that no accident makes."""
        return FileFault(self._message(what, _HOSTILE))

    def unreadable(self, what: str) -> FileFault:
        """A fault of the machine. The file may be sound."""
        return FileFault(self._message(what, _UNREADABLE))

    def _message(self, what: str, cure: str) -> str:
        run = f"run {_printable(self.run)}: " if self.run else ""
        field = f"field {_printable(self.field)}: " if self.field else ""
        return f"{self.path}: {run}{field}{what}: {cure}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what HDF5 or the system raises into a fault at this location: damaged, or unreadable."""
        try:
            yield
        except FileFault:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
            fault = self.unreadable if _of_the_machine(error) else self.damaged
            raise fault(f"HDF5 cannot read it ({' '.join(str(error).split())[:200]})") from error


def open_file(location: Location) -> h5py.File:
    """Open the file for reading. Raises FileFault."""
    path = location.path
    with location.reading():
        if not path.exists():
            raise FileFault(f"{path}: there is no such file: make it with `python -m collect gather trajectories`")
        if not path.is_file():  # a pipe would block for ever
            raise FileFault(f"{path}: not a regular file: name a trajectory file (.h5)")
        return h5py.File(path, "r", locking="best-effort")


def contents(location: Location, file: h5py.File) -> dict[str, Any]:
    """The version and the ids of all runs of a file, and what is wrong beside them."""
    faults: list[FileFault] = []
    root = _root(location, file)
    if attribute(location, root, "format") != FORMAT:
        raise FileFault(f"{location.path}: an HDF5 file without trajectories: name one that gather or merge wrote")
    version = attribute(location, root, "version")
    if version not in READABLE_VERSIONS:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        kind, cure = (FileFault, "update the toolkit") if newer else (DamagedFile, "gather it again")
        raise kind(f"{location.path}: format version {version}, but this toolkit reads 1 to {FORMAT_VERSION}: {cure}")
    faults += attribute_faults(location, root, 2)
    faults += [
        location.hostile(f"{name!r:.60} is beside the runs")
        for name in names(location, root, _MOST_NAMES)
        if name != b"runs"
    ]
    runs = open_member(location, root, "runs", h5g.GroupID)
    faults += attribute_faults(location, runs, 0)
    found = [raw.decode("utf-8", "replace") for raw in sorted(names(location, runs, MOST_RUNS))]
    rule = "a run's id is up to 100 letters, digits, . _ and -"
    faults += [location.at(run=name).hostile(rule) for name in found if not is_run_id(name)]
    return {"faults": faults, "version": version, "run_ids": [name for name in found if is_run_id(name)]}


def stored_run(location: Location, file: h5py.File) -> dict[str, Any]:
    """The checksum and the chunks of one run, and what is wrong with its other fields.

    Everything declared is checked before a chunk is read.
    """
    runs = open_member(location, _root(location, file), "runs", h5g.GroupID)
    group = open_member(location, runs, location.run, h5g.GroupID)
    found = {name.decode("utf-8", "replace") for name in names(location, group, _MOST_NAMES)}
    datasets: dict[str, h5d.DatasetID] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    faults: list[FileFault] = []
    for field in (field for field in FIELDS if field.name in found):
        at = location.at(field=field.name)
        try:
            datasets[field.name] = open_member(at, group, field.name, h5d.DatasetID)
            shapes[field.name] = declared_shape(at, datasets[field.name], field)
        except FileFault as fault:
            faults.append(fault)
    wrong = list(shape_faults(shapes))
    faults += [location.at(field=name).hostile(what) for name, what in wrong]
    chunks: dict[str, Chunk] = {}
    for field in FIELDS if total_bytes(shapes) <= MOST_RUN_BYTES else ():
        if field.name in shapes and field.name not in dict(wrong):
            at = location.at(field=field.name)
            try:
                chunks[field.name] = stored_chunk(at, datasets[field.name], field, shapes[field.name])
            except FileFault as fault:
                faults.append(fault)
    missing = sorted({field.name for field in FIELDS if not field.retired} - found)
    faults += [location.at(field=name).damaged("missing") for name in missing]
    extra = sorted(found - {field.name for field in FIELDS})
    faults += [location.at(field=name).hostile("the format has no such field") for name in extra]
    faults += attribute_faults(location, group, 1)
    sha256 = ""
    try:
        sha256 = str(attribute(location, group, "sha256"))
    except FileFault as fault:
        faults.append(fault)
    return {"faults": faults, "sha256": sha256, "chunks": chunks}


def _root(location: Location, file: h5py.File) -> h5g.GroupID:
    with location.reading():
        return h5g.open(file.id, b"/")


def names(location: Location, group: h5g.GroupID, most: int) -> list[bytes]:
    """The names in a group. A group with more than `most` is refused without listing the rest."""
    found: list[bytes] = []

    def take(name: bytes) -> bool | None:
        found.append(name)
        return True if len(found) > most else None  # True ends the iteration

    with location.reading():
        group.links.iterate(take)
    if len(found) > most:
        raise location.hostile(f"more than the {most} members that it may have")
    return found


def open_member(location: Location, group: h5g.GroupID, name: str, kind: type) -> Any:
    """Open a member of a group, a GroupID or DatasetID as `kind` says. Only a hard link is followed."""
    with location.reading():
        link = group.links.get_info(name.encode()).type
        if link != h5l.TYPE_HARD:
            raise location.hostile(f"{_LINKS.get(link, 'a user-defined link')} instead of the data")
        found = h5o.open(group, name.encode())
    if not isinstance(found, kind):
        expected = "dataset" if kind is h5d.DatasetID else "group"
        raise location.hostile(f"a {expected} is expected, not {type(found).__name__}")
    return found


def attribute_faults(location: Location, thing: Any, expected: int) -> list[FileFault]:
    """A fault if something has more or fewer attributes than the format says."""
    try:
        with location.reading():
            count = h5a.get_num_attrs(thing)
    except FileFault as fault:
        return [fault]
    return [] if count == expected else [location.hostile(f"{count} attributes where the format has {expected}")]


def attribute(location: Location, thing: Any, name: str) -> str | int:
    """A scalar attribute: text of a fixed length up to 100 bytes, or an integer."""
    with location.reading():
        if not h5a.exists(thing, name.encode()):
            raise location.damaged(f"attribute {name!r} is missing")
        found = h5a.open(thing, name.encode())
        kind = found.get_type()
        text = kind.get_class() == h5t.STRING and not kind.is_variable_str()
        if not (text or kind.get_class() == h5t.INTEGER) or kind.get_size() > 100:
            raise location.hostile(f"attribute {name!r} is of a type that the format does not have")
        if found.get_space().get_simple_extent_type() != h5s.SCALAR:
            raise location.hostile(f"attribute {name!r} is not a single value")
        value = np.empty((), dtype=found.dtype)
        found.read(value)
        return value.item().decode("ascii", "replace") if text else int(value)


def declared_shape(location: Location, dataset: h5d.DatasetID, field: Field) -> tuple[int, ...]:
    """The shape that a dataset declares, once its storage, type and filters are the format's. Reads no data."""
    with location.reading():
        plan = dataset.get_create_plist()
        # The layout comes first: asking a virtual dataset for its shape already opens other files.
        if plan.get_layout() == h5d.VIRTUAL:
            raise location.hostile("a virtual dataset, whose data are in other files")
        if plan.get_external_count():
            raise location.hostile("external storage, with the data in other files")
        if plan.get_layout() != h5d.CHUNKED:
            raise location.hostile("its storage is not in chunks")
        for fault in attribute_faults(location, dataset, 0):
            raise fault
        kind = dataset.get_type()
        if kind != _TYPES[field.dtype]:
            raise location.hostile(
                f"of HDF5's type class {kind.get_class()}, {kind.get_size()} bytes, not {field.dtype}"
            )
        filters = tuple(plan.get_filter(index)[0] for index in range(plan.get_nfilters()))
        if filters != _FILTERS:
            raise location.hostile(f"filters {filters}: the format has shuffle (2) and deflate (1), in this order")
        space = dataset.get_space()
        if space.get_simple_extent_type() != h5s.SIMPLE:
            raise location.hostile("it has no shape")
        shape: tuple[int, ...] = space.get_simple_extent_dims()
        if plan.get_chunk() != shape or space.get_simple_extent_dims(True) != shape:
            raise location.hostile(
                f"shape {shape} with chunks of {plan.get_chunk()}: a field is one chunk of fixed size"
            )
    return shape


def stored_chunk(location: Location, dataset: h5d.DatasetID, field: Field, shape: tuple[int, ...]) -> Chunk:
    """The one chunk of a dataset, which takes no more memory than the dataset declares."""
    size = math.prod(shape) * field.item_bytes
    with location.reading():
        if dataset.get_num_chunks() != 1:
            raise location.damaged(f"declares {size} bytes and stores none of them")
        stored = dataset.get_chunk_info(0).size
        if stored > size + size // 100 + 1000:  # deflate adds less than that to what it cannot compress
            raise location.hostile(f"stores {stored} bytes for the {size} that it declares")
        mask, raw = dataset.read_direct_chunk((0,) * len(shape))
    return Chunk(shape, mask, raw)


def _of_the_machine(error: Exception) -> bool:
    """Whether memory or the system failed, and not the file. HDF5 puts the system's error number into its text."""
    numbered = isinstance(error, OSError) and bool(error.errno)
    return numbered or isinstance(error, MemoryError) or re.search(r"errno = [1-9]", str(error)) is not None


def _printable(name: str) -> str:
    """A name out of the file, fit for a terminal."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 120 else shown[:117] + "..."

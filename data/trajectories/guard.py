"""Looks into an untrusted HDF5 file: what the format does not use is refused before it is followed.

HDF5 lets a file have other files read, load plugins and ask for any amount of memory. So only hard links are opened.
The storage, type, filters and size that a dataset declares are checked before its data are read. Its one chunk is then
fetched as stored, and inflated here by zlib: HDF5 itself would inflate far beyond the declared size.
"""

import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t, h5z

from data.trajectories.schema import Field
from predictor.errors import DamagedFile, FileFault

_DAMAGED = "copy it again, or make it with `python -m collect gather trajectories`"
_HOSTILE = "no file of this toolkit holds that; do not use it, and get it again from its author"
_UNREADABLE = "make it readable for this user, or try again when the machine can read it"
_TYPES = {"|u1": h5t.STD_U8LE, "<i8": h5t.STD_I64LE, "<f4": h5t.IEEE_F32LE, "<f8": h5t.IEEE_F64LE}
_FILTERS = (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE)
_NOT_DEFLATED = 0b10
"""Filter mask of a chunk that deflate would have made larger: HDF5 stores it shuffled only."""
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}


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


def check_attributes(location: Location, thing: Any, expected: int) -> None:
    """Refuse attributes that the format does not have."""
    with location.reading():
        count = h5a.get_num_attrs(thing)
    if count != expected:
        raise location.hostile(f"{count} attributes where the format has {expected}")


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
        check_attributes(location, dataset, 0)
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


def stored_array(location: Location, dataset: h5d.DatasetID, field: Field, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The values of a dataset. Memory is bounded by its declared size, whatever the stored bytes would expand to."""
    size = math.prod(shape) * field.item_bytes
    with location.reading():
        if dataset.get_num_chunks() != 1:
            raise location.damaged(f"declares {size} bytes and stores none of them")
        stored = dataset.get_chunk_info(0).size
        if stored > size + size // 100 + 1000:  # deflate adds less than that to what it cannot compress
            raise location.hostile(f"stores {stored} bytes for the {size} that it declares")
        mask, raw = dataset.read_direct_chunk((0,) * len(shape))
    if mask != _NOT_DEFLATED:
        try:
            raw = zlib.decompressobj().decompress(raw, size + 1)
        except zlib.error as error:
            raise location.damaged(f"its compressed data are broken ({error})") from None
    if len(raw) != size:
        raise location.damaged(f"{len(raw)} bytes or more where its shape needs {size}")
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(field.item_bytes, -1)
    values: npt.NDArray[Any] = planes.T.copy().view(field.dtype).reshape(shape)
    return values


def _of_the_machine(error: Exception) -> bool:
    """Whether memory or the system failed, and not the file. HDF5 puts the system's error number into its text."""
    numbered = isinstance(error, OSError) and bool(error.errno)
    return numbered or isinstance(error, MemoryError) or re.search(r"errno = [1-9]", str(error)) is not None


def _printable(name: str) -> str:
    """A name out of the file, fit for a terminal."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 120 else shown[:117] + "..."

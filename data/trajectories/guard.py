"""Looks into an HDF5 file that nobody vouches for: what the format does not use is refused before it is followed.

HDF5 lets a file have other files read, load plugins and ask for any amount of memory. So a name is opened only if it is
a hard link; a dataset's storage, type, filters and size are judged from what it declares; and its bytes are fetched as
they lie in the file and decoded here, never past the declared size.
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

_DAMAGED = "copy it anew, or make it again with `python -m collect gather trajectories`"
_HOSTILE = "no file of this toolkit holds that; do not use it, and get it anew from where it came"
_UNREADABLE = "make it readable for this user, or try again when the machine can read it"
_TYPES = {"|u1": h5t.STD_U8LE, "<i8": h5t.STD_I64LE, "<f4": h5t.IEEE_F32LE, "<f8": h5t.IEEE_F64LE}
_PIPELINES = ((), (h5z.FILTER_SHUFFLE,), (h5z.FILTER_DEFLATE,), (h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE))
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}
_DEFLATE_AT_MOST = 1100
"""No deflate stream expands more than about 1032 times."""


@dataclass(frozen=True)
class Place:
    """Where in which file something lies, so that every fault can say so."""

    path: Path
    run: str = ""
    field: str = ""

    def at(self, run: str = "", field: str = "") -> "Place":
        """A place further in."""
        return replace(self, run=run or self.run, field=field or self.field)

    def damaged(self, what: str) -> DamagedFile:
        """A fault as a broken disk or an interrupted copy leaves it."""
        return DamagedFile(self._told(what, _DAMAGED))

    def hostile(self, what: str) -> FileFault:
        """A fault that no accident makes."""
        return FileFault(self._told(what, _HOSTILE))

    def unreadable(self, what: str) -> FileFault:
        """A fault of the machine: the file may well be sound."""
        return FileFault(self._told(what, _UNREADABLE))

    def _told(self, what: str, cure: str) -> str:
        run = f"run {_clip(self.run)}: " if self.run else ""
        field = f"field {_clip(self.field)}: " if self.field else ""
        return f"{self.path}: {run}{field}{what}: {cure}"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever HDF5 raises, on a damaged file or where reading fails, into a fault of this place."""
        try:
            yield
        except FileFault:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
            fault = self.unreadable if _of_the_machine(error) else self.damaged
            raise fault(f"HDF5 cannot read it ({' '.join(str(error).split())[:200]})") from error


def open_file(place: Place) -> h5py.File:
    """The file, opened for reading."""
    try:
        if not place.path.exists():
            raise FileFault(
                f"{place.path}: there is no such file: make it with `python -m collect gather trajectories`"
            )
        if not place.path.is_file():  # a pipe would block for ever
            raise FileFault(f"{place.path}: not a regular file: name a trajectory file (.h5)")
        with place.path.open("rb"):
            pass
    except OSError as error:
        raise FileFault(f"{place.path}: cannot be read ({error.strerror}): make it readable for this user") from error
    with place.reading():
        return h5py.File(place.path, "r", locking="best-effort")


def names(place: Place, group: h5g.GroupID, most: int) -> list[bytes]:
    """The names in a group. A group with more than `most` is refused without reading on."""
    found: list[bytes] = []

    def take(name: bytes) -> bool | None:
        found.append(name)
        return True if len(found) > most else None  # True ends the iteration

    with place.reading():
        group.links.iterate(take)
    if len(found) > most:
        raise place.hostile(f"more than the {most} members that it may have")
    return found


def open_member(place: Place, group: h5g.GroupID, name: str, kind: type) -> Any:
    """A group's member, a GroupID or DatasetID as `kind` says. Only a hard link is followed."""
    with place.reading():
        link = group.links.get_info(name.encode()).type
    if link != h5l.TYPE_HARD:
        raise place.hostile(f"{_LINKS.get(link, 'a user-defined link')} in the place of the data itself")
    with place.reading():
        found = h5o.open(group, name.encode())
    if not isinstance(found, kind):
        raise place.hostile(
            f"a {'dataset' if kind is h5d.DatasetID else 'group'} is expected, not {type(found).__name__}"
        )
    return found


def check_attributes(place: Place, thing: Any, expected: int) -> None:
    """Refuse attributes beside those that the format has."""
    with place.reading():
        count = h5a.get_num_attrs(thing)
    if count != expected:
        raise place.hostile(f"{count} attributes where the format has {expected}")


def attribute(place: Place, thing: Any, name: str) -> str | int:
    """A scalar attribute: text of a fixed length up to 100 bytes, or an integer."""
    with place.reading():
        if not h5a.exists(thing, name.encode()):
            raise place.damaged(f"attribute {name!r} is missing")
        found = h5a.open(thing, name.encode())
        kind, space = found.get_type(), found.get_space()
        text = kind.get_class() == h5t.STRING and not kind.is_variable_str()
        if not (text or kind.get_class() == h5t.INTEGER) or kind.get_size() > 100:
            raise place.hostile(f"attribute {name!r} is of a type that the format does not have")
        if space.get_simple_extent_type() != h5s.SCALAR:
            raise place.hostile(f"attribute {name!r} is not a single value")
        value = np.empty((), dtype=found.dtype)
        found.read(value)
        return value.item().decode("ascii", "replace") if text else int(value)


def declared_shape(place: Place, dataset: h5d.DatasetID, field: Field) -> tuple[int, ...]:
    """What a dataset says of itself, judged without reading it: its storage, type, filters and shape."""
    with place.reading():
        plan = dataset.get_create_plist()
        # The layout comes first: asking a virtual dataset for its shape already opens other files.
        if plan.get_layout() == h5d.VIRTUAL:
            raise place.hostile("a virtual dataset, whose data lie in other files")
        if plan.get_external_count():
            raise place.hostile("external storage, whose data lie in other files")
        if plan.get_layout() != h5d.CHUNKED:
            raise place.hostile("its storage is not in chunks")
        check_attributes(place, dataset, 0)
        if dataset.get_type() != _TYPES[field.dtype]:
            raise place.hostile(f"of type {_type_name(dataset)}, not {field.dtype}")
        pipeline = tuple(plan.get_filter(position)[0] for position in range(plan.get_nfilters()))
        if pipeline not in _PIPELINES:
            raise place.hostile(f"filters {pipeline}: only shuffle (2) and deflate (1), in this order, are allowed")
        space = dataset.get_space()
        if space.get_simple_extent_type() != h5s.SIMPLE:
            raise place.hostile("it has no shape")
        shape: tuple[int, ...] = space.get_simple_extent_dims()
        if plan.get_chunk() != shape or space.get_simple_extent_dims(True) != shape:
            raise place.hostile(f"shape {shape} with chunks of {plan.get_chunk()}: a field is one chunk of fixed size")
    return shape


def stored_array(place: Place, dataset: h5d.DatasetID, field: Field, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A dataset's values, in memory for its declared size whatever the stored bytes would expand to."""
    size = math.prod(shape) * field.item_bytes
    with place.reading():
        raw, pending = _stored_bytes(place, dataset, size)
    if h5z.FILTER_DEFLATE in pending:
        raw = _inflated(place, raw, size)
    if len(raw) != size:
        raise place.damaged(f"{len(raw)} bytes where its shape needs {size}")
    if h5z.FILTER_SHUFFLE in pending and field.item_bytes > 1:
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(field.item_bytes, -1)
        return planes.T.copy().view(field.dtype).reshape(shape)
    return np.frombuffer(raw, dtype=field.dtype).reshape(shape).copy()


def _stored_bytes(place: Place, dataset: h5d.DatasetID, size: int) -> tuple[bytes, tuple[int, ...]]:
    """A dataset's only chunk as it lies in the file, and the filters that it went through."""
    if dataset.get_num_chunks() != 1:
        raise place.damaged(f"declares {size} bytes and stores none of them")
    chunk, plan = dataset.get_chunk_info(0), dataset.get_create_plist()
    there = place.path.stat().st_size
    if chunk.byte_offset is None or chunk.byte_offset + chunk.size > there:
        raise place.damaged(f"its data reach beyond the end of the file ({there} bytes)")
    filters = tuple(plan.get_filter(position)[0] for position in range(plan.get_nfilters()))
    pending = tuple(code for position, code in enumerate(filters) if not chunk.filter_mask >> position & 1)
    expansion = _DEFLATE_AT_MOST if h5z.FILTER_DEFLATE in pending else 1
    if chunk.size > size + size // 100 + 1000:
        raise place.hostile(f"stores {chunk.size} bytes for the {size} that it declares")
    if size > chunk.size * expansion:
        raise place.hostile(f"declares {size} bytes, which the {chunk.size} stored ones cannot hold")
    return dataset.read_direct_chunk((0,) * dataset.rank)[1], pending


def _inflated(place: Place, raw: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(raw, size)
        rest = stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise place.damaged(f"its compressed data are broken ({error})") from None
    if rest or not stream.eof:
        raise place.damaged(f"its compressed data do not end after the {size} bytes of its shape")
    return content


def _type_name(dataset: h5d.DatasetID) -> str:
    kinds = {h5t.VLEN: "variable length", h5t.REFERENCE: "reference", h5t.STRING: "string", h5t.COMPOUND: "compound"}
    kind = dataset.get_type()
    return kinds.get(kind.get_class(), f"{kind.get_size()}-byte number of another kind")


def _of_the_machine(error: Exception) -> bool:
    """Whether memory or the operating system failed, and not the file. HDF5 tells the system's number in its text."""
    numbered = isinstance(error, OSError) and bool(error.errno)
    return numbered or isinstance(error, MemoryError) or re.search(r"errno = [1-9]", str(error)) is not None


def _clip(name: str) -> str:
    """A name fit for a terminal, whatever the file made of it."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 120 else shown[:117] + "..."

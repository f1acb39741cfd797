"""Reads R's lazy-load data bases (`Rdata.rdx` + `Rdata.rdb`): only plain vectors, so no code and no pickle is run."""

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any

from predictor.errors import FileFault

# Item types of R's serialization, version 2 and 3.
_SYMBOL, _PAIRLIST, _CHARACTERS, _LOGICALS, _INTEGERS, _REALS, _STRINGS, _VECTOR = 1, 2, 9, 10, 13, 14, 16, 19
_NULL, _REFERENCE = 254, 255


def read_data_frame(folder: Path, name: str) -> dict[str, list[Any]]:
    """Columns of the data frame `name` from `Rdata.rdx` and `Rdata.rdb` in `folder`; factors come as their levels.

    It knows what the data sets here need: plain vectors and factors without missing values.

    Raises FileFault when the files are broken or hold no data frame of that name.
    """
    try:
        places = _items(_Reader(gzip.decompress((folder / "Rdata.rdx").read_bytes())).content())
        offset, length = _items(places["variables"])[name][0]
        chunk = (folder / "Rdata.rdb").read_bytes()[offset : offset + length]
        columns = _items(_Reader(_inflate(chunk)).content())
        return {key: _column(value) for key, value in columns.items()}
    except (OSError, EOFError, ValueError, LookupError, TypeError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise FileFault(f"{folder}/Rdata.rdb: {name} cannot be read ({error!r}); install the package again") from error


def _inflate(chunk: bytes) -> bytes:
    """A chunk of the data base: a 4-byte length, then `Z` and raw LZMA2, `2` and bzip2, or zlib."""
    kind = chunk[4:5]
    if kind == b"Z":
        return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    return bz2.decompress(chunk[5:]) if kind == b"2" else zlib.decompress(chunk[4:])


def _items(value: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    content, attributes = value
    return dict(zip(attributes["names"][0], content, strict=True))


def _column(value: tuple[Any, dict[str, Any]]) -> list[Any]:
    content, attributes = value
    if "levels" in attributes:
        levels = attributes["levels"][0]
        return [levels[code - 1] for code in content]
    return list(content)


class _Reader:
    """R's XDR serialization. Every vector comes as a pair: its elements, and its attributes by name."""

    def __init__(self, content: bytes) -> None:
        self._bytes = content
        self._place = 0
        self._symbols: list[str] = []

    def content(self) -> Any:
        if self._take(2) != b"X\n":
            raise ValueError("not R's XDR serialization")
        version, _, _ = self._integers(3)
        if version == 3:
            self._take(self._integers(1)[0])  # the name of the native encoding
        return self._item()

    def _item(self) -> Any:
        flags = self._integers(1)[0]
        kind, has_attributes, has_tag = flags & 255, bool(flags & 512), bool(flags & 1024)
        if kind == _NULL:
            return None
        if kind == _REFERENCE:
            return self._symbols[(flags >> 8 or self._integers(1)[0]) - 1]
        if kind == _SYMBOL:
            self._symbols.append(self._item())
            return self._symbols[-1]
        if kind == _CHARACTERS:
            length = self._integers(1)[0]
            return None if length < 0 else self._take(length).decode("latin-1" if flags & (4 << 12) else "utf-8")
        if kind == _PAIRLIST:
            return self._pairs(has_attributes, has_tag)
        elements = self._elements(kind)
        return elements, (self._item() or {}) if has_attributes else {}

    def _elements(self, kind: int) -> list[Any]:
        length = self._integers(1)[0]
        if kind in (_INTEGERS, _LOGICALS):
            return list(self._integers(length))
        if kind == _REALS:
            return list(struct.unpack(f">{length}d", self._take(8 * length)))
        if kind in (_STRINGS, _VECTOR):
            return [self._item() for _ in range(length)]
        raise ValueError(f"item of type {kind}")

    def _pairs(self, has_attributes: bool, has_tag: bool) -> dict[str, Any]:
        """A pairlist as a dict; it is stored as head and rest, which is read in a loop instead of recursively."""
        pairs: dict[str, Any] = {}
        while True:
            if has_attributes:
                self._item()
            tag = self._item() if has_tag else str(len(pairs))
            pairs[tag] = self._item()
            flags = self._integers(1)[0]
            if flags & 255 == _NULL:
                return pairs
            has_attributes, has_tag = bool(flags & 512), bool(flags & 1024)

    def _integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._take(4 * count))

    def _take(self, length: int) -> bytes:
        part = self._bytes[self._place : self._place + length]
        if length < 0 or len(part) < length:
            raise EOFError("it ends too early")
        self._place += length
        return part

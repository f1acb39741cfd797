"""Files are written whole or not at all: a temporary neighbour, flushed to the disk, then renamed."""

import errno
import gzip
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from predictor.errors import FileFault, UsageError

_LONGEST_LINE = 1 << 23
"""Bytes; a trial's line has some thousands. A packed file of a few kilobytes may unpack to any length."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. When the block ends without an error, it becomes `path` in one step.

    The temporary name is `NAME.part`. If the block raises, the temporary file is removed and an older `path` stays as
    it was. Raises FileFault for a full disk, and for a folder that cannot be written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def append_json_line(path: Path, content: Any) -> None:
    """Append one JSON object as a line and flush it to the disk. A line that a kill cut short is ended first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")
            file.write(json.dumps(content, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order. Lines that hold no object, as after a kill, are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also numbers with too many digits, and brackets nested too deeply
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a text, or of one packed by gzip if it is named so, one at a time.

    Raises:
        FileFault: a line is longer than 8 MiB, as in a file that was made to fill the memory.
        OSError, EOFError, zlib.error: the file cannot be read or unpacked.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise FileFault(f"{path}: a line of more than {_LONGEST_LINE} bytes: this is no file of JSON lines")
            yield line


@contextmanager
def held(path: Path, work: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made if it is missing. The lock ends with this process.

    Args:
        path: the file.
        work: what else may hold the lock, for the error, such as "another tune".
        wait_seconds: how long to wait for that.

    Raises:
        UsageError: while another process holds it.
        FileFault: if the file cannot be made.
    """
    import fcntl  # POSIX only, and the library must import elsewhere too

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise _cannot_write(path, error) from error
    end = time.monotonic() + wait_seconds
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    cure = "wait for it to end, or choose another place with --out"
                    raise UsageError(f"{path.parent}: {work} is at work there: {cure}") from error
                time.sleep(0.1)
        yield


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after the rename cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> FileFault:
    cure = (
        "the disk is full; free some space or choose another place with --out"
        if error.errno == errno.ENOSPC
        else "choose another place with --out, or make that one writable"
    )
    return FileFault(f"{path}: cannot be written ({error.strerror or error}): {cure}")

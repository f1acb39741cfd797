"""Runs HDF5 in a child process with limits: on hostile files it crashes, corrupts memory and loops."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data.trajectories.guard import Chunk, Location, contents, open_file, stored_run
from predictor.errors import DamagedFile, FileFault

_CHECKOUT = Path(__file__).parents[2]
_MEMORY_BYTES = 3 << 29
"""What the child may take, beside what it starts with. A run's chunks take two thirds of it at most."""
_CPU_SECONDS = 20
"""For one request."""
_KINDS: dict[str, type[FileFault]] = {kind.__name__: kind for kind in (FileFault, DamagedFile)}


@dataclass(frozen=True)
class Answer:
    """What the child says of a file (run_ids, version) or of a run (sha256, chunks), and every fault."""

    faults: list[FileFault]
    run_ids: list[str] = field(default_factory=list)
    version: int = 0
    sha256: str = ""
    chunks: dict[str, Chunk] = field(default_factory=dict)


def answer(path: Path, run_id: str = "") -> Answer:
    """Look at a file, or read one run of it as it is stored. Raises FileFault where that is not possible."""
    location = Location(path)
    with location.reading(), closing(open_file(location)) as file:
        if run_id:
            return Answer(**stored_run(location.at(run=run_id), file))
        return Answer(**contents(location, file))


def ask(path: Path, run_id: str = "") -> Answer:
    """The same, from the child. A file that it crashes on, twice and from a fresh start, is refused."""
    status = None
    for _ in range(2):
        with _lock:
            try:
                return _asked(path, run_id)
            except FileFault:
                raise
            except (OSError, EOFError, ValueError, TypeError, KeyError, MemoryError):
                status = _stop()  # the file before may have left the child broken
            except BaseException:  # Ctrl-C in the middle of an answer
                _stop()
                raise
    raise Location(path, run_id).hostile(f"HDF5 crashes on it, or takes too long or too much memory (status {status})")


_lock = threading.Lock()
_running: list[tuple[int, "subprocess.Popen[bytes]"]] = []
"""The id of this process, which may have been forked since, and its child."""


def _asked(path: Path, run_id: str) -> Answer:
    if not _running or _running[0][0] != os.getpid() or _running[0][1].poll() is not None:
        _start()
    child = _running[0][1]
    assert child.stdin
    assert child.stdout
    child.stdin.write(json.dumps([os.getcwd(), str(path), run_id]).encode() + b"\n")
    child.stdin.flush()
    head = json.loads(_exactly(child.stdout, int.from_bytes(_exactly(child.stdout, 8), "little")))
    if "raised" in head:
        raise _fault(*head["raised"])
    chunks = {
        name: Chunk(tuple(shape), mask, _exactly(child.stdout, size)) for name, shape, mask, size in head["chunks"]
    }
    return Answer(
        [_fault(*fault) for fault in head["faults"]], head["run_ids"], head["version"], head["sha256"], chunks
    )


def _fault(kind: str, text: str) -> FileFault:
    return _KINDS[kind](text)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the child ended")
    return content


def _start() -> None:
    _stop()  # one that has died by itself still holds its pipes
    _running.clear()
    command = [sys.executable, "-m", __name__]
    child = subprocess.Popen(
        command, cwd=_CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    _running.append((os.getpid(), child))


@atexit.register
def _stop() -> int | None:
    """End the child. Returns the exit status that it ended with by itself, or None."""
    if not _running or _running[0][0] != os.getpid():
        return None
    child = _running.pop()[1]
    for pipe in (child.stdin, child.stdout):  # without them it ends
        with suppress(OSError):
            assert pipe
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        return child.wait(1)
    child.kill()
    child.wait()
    return None


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """In the child: answer each request, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _limit_memory()
    for line in requests:
        _limit_time()
        folder, path, run_id = json.loads(line)
        head: dict[str, Any]
        try:
            os.chdir(folder)  # so that faults name the path as it was given
            said = answer(Path(path), run_id)
        except FileFault as fault:
            head, chunks = {"raised": _words(fault)}, {}
        else:
            chunks = said.chunks
            head = {**vars(said), "faults": [_words(fault) for fault in said.faults]}
            head["chunks"] = [(name, chunk.shape, chunk.mask, len(chunk.raw)) for name, chunk in chunks.items()]
        text = json.dumps(head).encode()
        answers.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks.values():
            answers.write(chunk.raw)
        answers.flush()


def _words(fault: FileFault) -> tuple[str, str]:
    return type(fault).__name__, str(fault)


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):  # where the system has no such limits, or lower ones
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)

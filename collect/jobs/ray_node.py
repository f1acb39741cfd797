"""What the Ray engine does away from the driver: a job on its node, and the mailbox through which both sides speak."""

import asyncio
import contextlib
import errno
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collect.jobs.engine import Event, Job
from collect.jobs.process import WorkerProcess, process_environment

_SECONDS_BETWEEN_CHANGES = 1.0
"""A node that dies loses no more of what a job has written than what was written since."""
_SECONDS_BETWEEN_SHARES = 1.0
_SECONDS_TO_LOCK = 60.0
"""The age from which a folder without a lock is a left-over, and not one that is being made."""
_PREFIX = "smartfrz-job-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
TOKEN_FILE = ".shared"
_LOG = "log"
"""The job's log in its own folder."""


class WorkerDied(Exception):
    """The process of a job died. Ray then tries the job again, as for a node that died."""


@dataclass(frozen=True)
class Order:
    """What a node must know of a job, besides the files that it asks for when it begins."""

    job: Job
    folder: str
    """The driver's folder."""
    log: str
    """The driver's file for what the job prints."""
    token: str
    """What `TOKEN_FILE` in the driver's folder holds: a node that reads it there shares the folder."""
    threads: int
    gpus: float
    environment: dict[str, str]
    seconds: float | None

    @property
    def shared(self) -> bool:
        """Whether this node sees the driver's folder, and the job needs nothing else of the driver's files."""
        try:
            return (
                bool(self.token)
                and not self.job.inputs
                and Path(self.folder, TOKEN_FILE).read_text(encoding="ascii") == self.token
            )
        except (OSError, ValueError):
            return False


@dataclass(frozen=True)
class Changes:
    """What a job has changed in its folder, and what it has printed."""

    files: dict[str, bytes]
    """Whole contents, by path."""
    removed: tuple[str, ...]
    printed: bytes
    offset: int = 0
    """Where that begins in all that this attempt has printed."""


class Mailbox:
    """Passes messages between the jobs and the driver. An actor beside the driver."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._some = asyncio.Event()
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def send(self, message: dict[str, Any]) -> None:
        """Leave a message for the driver."""
        self._messages.append(message)
        self._some.set()

    async def begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """Leave a message for the driver, and wait for its answer."""
        answer = self._answers[message["attempt"]] = asyncio.get_running_loop().create_future()
        await self.send(message)
        given: dict[str, Any] = await answer
        return given

    async def answer(self, attempt: str, answer: dict[str, Any]) -> None:
        """Answer an attempt that waits in `begin`."""
        waiting = self._answers.pop(attempt, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def receive(self) -> list[dict[str, Any]]:
        """Wait for messages, and take them all."""
        await self._some.wait()
        self._some.clear()
        messages, self._messages = self._messages, []
        return messages


def run_job(order: Order, mailbox: Any) -> dict[str, Any]:
    """Do a job on this node. The Ray task.

    Returns:
        The job's last `event`, its `attempt` and `node`, whether the driver's folder is `shared`, and the
        `changes` where it is not.
    """
    attempt, shared = uuid.uuid4().hex, order.shared
    post = _Post(mailbox, order.job.id, attempt)
    facts = {"attempt": attempt, "node": post.node, "shared": shared, "changes": None}
    answer = post.begin(shared)
    if "event" in answer:
        return {**facts, "event": answer["event"]}
    try:
        if shared:
            event, changes = _do(order, Path(order.folder), Path(order.log), post), None
        else:
            event, changes = _do_in_own_folder(order, post.files(answer), post)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        event, changes = {"failed": str(error), "full": True}, None
    if event.pop("died", False):
        if changes is not None:
            post.send_changes(changes)
        raise WorkerDied(event["failed"])
    return {**facts, "event": event, "changes": changes}


def versions() -> dict[str, str]:
    """What the driver and all nodes must have in common. Builds of one version for other devices are one."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in ("torch", "h5py", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package).partition("+")[0]
    return found


class _Post:
    """An attempt's side of the mailbox."""

    def __init__(self, mailbox: Any, job: str, attempt: str) -> None:
        import ray

        self._ray, self._mailbox = ray, mailbox
        context = ray.get_runtime_context()
        self.node = {"id": context.get_node_id(), "name": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"}
        self._facts = {"job": job, "attempt": attempt, "node": self.node}
        self._shared_at = 0.0

    def begin(self, shared: bool) -> dict[str, Any]:
        """Ask the driver for the job's files."""
        message = {**self._facts, "begins": True, "shared": shared, "versions": versions()}
        open_to_all = os.environ.get("RAY_AUTH_MODE", "").lower() != "token"
        answer: dict[str, Any] = self._ray.get(self._mailbox.begin.remote({**message, "open": open_to_all}))
        return answer

    def files(self, answer: dict[str, Any]) -> dict[str, bytes]:
        """The files that came with an answer."""
        files: dict[str, bytes] = {}
        for part in self._ray.get(answer["files"]):
            files |= part
        return files

    def send_share(self, event: Event) -> None:
        """Send the share that is done, not too often."""
        if time.monotonic() - self._shared_at > _SECONDS_BETWEEN_SHARES:
            self._shared_at = time.monotonic()
            self._mailbox.send.remote({**self._facts, "share": event["share"]})

    def send_changes(self, changes: Changes) -> None:
        """Send what has changed. It goes to the driver directly: the mailbox passes on a reference."""
        self._mailbox.send.remote({**self._facts, "changes": [self._ray.put(changes)]})


_processes: dict[tuple[tuple[str, str], ...], WorkerProcess] = {}
"""The process that does the jobs of this Ray worker, by its environment. Starting one takes seconds."""


def _do(order: Order, folder: Path, log: Path, post: _Post) -> Event:
    """Do a job in a folder."""
    gpus = {} if order.gpus else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    ours = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ}
    roots = {name: value for name, value in os.environ.items() if name.startswith("SMARTFRZ_")}
    environment = {**process_environment(order.threads), **ours, **gpus, **order.environment, **roots}
    key = (*sorted(environment.items()), ("seconds", str(order.seconds)))
    if key not in _processes:
        while _processes:  # other GPUs: two processes would hold memory of both
            _processes.popitem()[1].end()
        _processes[key] = WorkerProcess(environment, order.seconds)
    return _processes[key].do(order.job, folder, log, post.send_share)


def _do_in_own_folder(order: Order, files: dict[str, bytes], post: _Post) -> tuple[Event, Changes]:
    """Do a job in a folder of its own, with copies of its files. Changes are sent while it runs."""
    with _own_folder() as folder:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        watch = _Watch(folder)
        with _repeated(lambda: post.send_changes(changes) if (changes := watch.changes()) else None):
            event = _do(order, folder, folder / _LOG, post)
        return event, watch.all_changes()


class _Watch:
    """Notices what changes in a folder after it was made.

    A file that is written whole or not at all is another one afterwards, and one that is appended to has another size.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = self._sent = self._seen()
        self._printed = 0

    def changes(self) -> Changes | None:
        """What has changed since the last call; None for nothing."""
        changes = self._since(self._sent)
        return changes if changes.files or changes.removed or changes.printed else None

    def all_changes(self) -> Changes:
        """What has changed since the beginning: what was sent meanwhile may not have arrived."""
        gone = set(self._sent) - set(self._seen())
        self._printed = 0
        changes = self._since(self._began)
        return replace(changes, removed=tuple(gone.union(changes.removed)))

    def _since(self, before: dict[str, tuple[int, ...]]) -> Changes:
        now = self._seen()
        files = {}
        for name in [name for name, state in now.items() if before.get(name) != state]:
            with contextlib.suppress(FileNotFoundError):  # moved meanwhile: the next look finds it
                files[name] = (self._folder / name).read_bytes()
        self._sent = {name: state for name, state in now.items() if name in files or before.get(name) == state}
        offset = self._printed
        return Changes(files, tuple(set(before) - set(now)), self._new_lines(), offset)

    def _new_lines(self) -> bytes:
        with contextlib.suppress(FileNotFoundError), (self._folder / _LOG).open("rb") as file:
            file.seek(self._printed)
            printed = file.read()
            self._printed += len(printed)
            return printed
        return b""

    def _seen(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for path in self._folder.rglob("*"):
            name = str(path.relative_to(self._folder))
            if name not in (_LOG, _LOCK) and not name.endswith(".part"):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    if path.is_file():
                        found[name] = (state.st_ino, state.st_size, state.st_mtime_ns)
        return found


_LOCK = ".lock"


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder that is removed at the end, and by the next job of this node where that was killed."""
    import fcntl

    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _SECONDS_TO_LOCK:
                with (path / _LOCK).open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where a job holds it
                    shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _repeated(action: Callable[[], object]) -> Iterator[None]:
    """Do something again and again in a thread, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(_SECONDS_BETWEEN_CHANGES):
            with contextlib.suppress(OSError):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

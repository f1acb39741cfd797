"""A process that does jobs one after the other, seen from the engine that feeds it. It ends with this one."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from collect.jobs.engine import Event, Job

THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def process_environment(threads: int) -> dict[str, str]:
    """What each process finds in its environment besides ours: its threads, and where modules are."""
    return {
        **{name: str(threads) for name in THREAD_SETTINGS},
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


class WorkerProcess:
    """Feeds one process (`collect.jobs.worker`) with jobs, starts another when it dies, and passes its events on.

    Args:
        environment: What the process finds in its environment besides ours.
        seconds: How long a job may take; None sets no limit.
    """

    def __init__(self, environment: Mapping[str, str], seconds: float | None = None) -> None:
        self._environment, self._seconds = environment, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def do(self, job: Job, folder: Path, log: Path, report: Callable[[Event], None]) -> Event:
        """Do a job, report the shares that are done, and return the last event.

        Besides "done" or "failed" it may say that the job's GPU had no room ("crowded"), that a disk is full ("full"),
        or that the process died ("died").
        """
        used = self._process is not None
        began, event = self._do_once(job, folder, log, report)
        if used and not began and "died" in event:  # it was killed between two jobs, which is no fault of this one
            _, event = self._do_once(job, folder, log, report)
        return event

    def _do_once(self, job: Job, folder: Path, log: Path, report: Callable[[Event], None]) -> tuple[bool, Event]:
        """Whether the process began with the job, and the last event."""
        process = self._living_process()
        assert process.stdin is not None
        assert process.stdout is not None
        began = False
        with self._limited(process) as limit:
            order = {**asdict(job), "folder": str(folder), "log": str(log)}
            with contextlib.suppress(BrokenPipeError):  # killed just now: there will be no answer
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                if not line.endswith(b"\n"):  # killed while it wrote
                    break
                event: Event = json.loads(line)
                if "began" in event:
                    began = True
                    limit.begin()
                elif "share" in event:
                    report(event)
                else:
                    if event.pop("spent", False):
                        process.kill()  # its GPU refuses all further work of it
                        self.end()
                    return began, event
            status = self.end()
        if limit.is_over:
            return began, {"failed": f"it took longer than --run-timeout {self._seconds:g} (seconds), and was ended"}
        return began, {"failed": _how_it_died(status), "died": True}

    def stop(self) -> None:
        """End the process at once, and start no other."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> int:
        """Close the process's input, which ends it, and give its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    @contextlib.contextmanager
    def _limited(self, process: "subprocess.Popen[bytes]") -> Iterator["_Limit"]:
        """Yield what kills the process when its time is up."""
        limit = _Limit(self._seconds, process.kill)
        try:
            yield limit
        finally:
            limit.end()
            if limit.is_over:  # also where it had answered just before
                self.end()

    def _living_process(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._stopped:
                raise ProcessLookupError("the slot was stopped")
            if self._process is None:
                # A session of its own: Ctrl-C reaches the parent alone, which then ends the slots in order.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "collect.jobs.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **self._environment},
                    start_new_session=True,
                )
            return self._process


class _Limit:
    """Kills something when its time is up. Without a number of seconds it never is."""

    def __init__(self, seconds: float | None, kill: Callable[[], None]) -> None:
        self.is_over = False
        self._kill = kill
        self._timer = None if seconds is None else threading.Timer(seconds, self._end_it)

    def begin(self) -> None:
        """Begin to count."""
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """Count no more."""
        if self._timer is not None and self._timer.ident is not None:
            self._timer.cancel()
            self._timer.join()

    def _end_it(self) -> None:
        self.is_over = True
        self._kill()


def _how_it_died(status: int) -> str:
    if status == -9:
        return "its process was killed (signal 9): by hand, or because memory ran out"
    return f"its process died ({f'signal {-status}' if status < 0 else f'exit status {status}'})"

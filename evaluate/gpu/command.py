"""Runs the checks one after the other, each in a process of its own with a time limit, and writes the table."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evaluate.gpu.checks import CHECKS, SECOND, Check
from evaluate.gpu.table import Row, markdown
from predictor.errors import UsageError, unknown
from predictor.shared.files import written_whole

LOGS = Path("runs/gpu")
"""Where the logs of the checks are."""
_WORKER = [sys.executable, "-m", "evaluate.gpu.worker"]


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    only: tuple[str, ...] = ()
    """The names of the checks to run; all by default."""
    minutes: float = 10.0
    """The time for all of them."""
    out: Path = Path("runs/gpu.md")
    """Where the table goes."""


def run_checks(settings: Settings, say: Callable[[str], None] | None = None) -> int:
    """Run the checks, say one line each, and write the table. Returns the exit status: 1 where a check failed."""
    say = say or _say
    for name in settings.only:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    if not settings.minutes > 0:
        raise UsageError(f"minutes={settings.minutes}: give the minutes for all checks, above 0")
    device = _picked(settings.device)
    names = settings.only or tuple(CHECKS)
    say(_introduction(device, len(names), settings.minutes))
    _write(settings.out, device, [])  # before minutes of work: a place that cannot be written to fails now
    rows: list[Row] = []
    end = time.monotonic() + 60 * settings.minutes
    try:
        for name in tqdm(names, unit="check", disable=None, dynamic_ncols=True, leave=False):
            rows.append(_row(name, CHECKS[name], device, end - time.monotonic()))
            say(rows[-1].line)
    finally:
        _write(settings.out, device, rows)
        say(_summary(rows, len(names), settings.out))
    return int(any(row.status == "FAILED" for row in rows))


def _say(line: str) -> None:
    """Print a line above the progress bar, at once also into a file."""
    tqdm.write(line)
    sys.stdout.flush()


def _picked(name: str) -> str:
    """The device as torch names it: "cpu", or one CUDA device."""
    from collect.training.device import pick_device

    device = pick_device(name)
    if name == "auto" and device.type != "cuda":
        return "cpu"
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device={name!r}: these checks are of CUDA; give auto, cpu, cuda or cuda:1")
    return f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"


def _introduction(device: str, count: int, minutes: float) -> str:
    if device == "cpu":
        return f"no CUDA device is used: {count} checks, small, on the CPU and on the tests' second device"
    return f"{count} checks on {device}, in at most {minutes:g} minutes"


def _row(name: str, check: Check, device: str, seconds_left: float) -> Row:
    where = device if device != "cpu" else check.without_gpu
    if not where:
        return Row(name, check.about, "skipped", "needs a GPU", 0.0)
    if seconds_left < 1:
        return Row(name, check.about, "skipped", "no time was left: give more --minutes", 0.0)
    start = time.monotonic()
    status, line = run_check(name, where, min(check.seconds * (1 if where == device else 2), seconds_left))
    shown = "the second device" if where == SECOND else where
    return Row(name, check.about, status, f"{line} [{shown}]", time.monotonic() - start)


def run_check(name: str, device: str, seconds: float, command: Sequence[str] = _WORKER) -> tuple[str, str]:
    """Run one check in its own process, and give its status and its line.

    Args:
        name: The check.
        device: Where.
        seconds: The time limit. When it is over, or at Ctrl-C, the process and all that it started end.
        command: The program, for tests.
    """
    log = LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        answer = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [*command, name, device, str(answer)],
            stdin=subprocess.PIPE,  # the process ends when this closes
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "FAILED", f"took more than {seconds:.0f} seconds ({log})"
        finally:
            _end(process)
        if not answer.exists():
            return "FAILED", f"its process died, with status {status} ({log})"
        found = json.loads(answer.read_text(encoding="utf-8"))
    line = " ".join(str(found["line"]).split())
    return found["status"], f"{line} ({log})" if found["status"] == "FAILED" else line


def _environment() -> dict[str, str]:
    # The first is read when CUDA starts, and some operators are not deterministic without it.
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the leader may be gone and its children not
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _write(path: Path, device: str, rows: Sequence[Row]) -> None:
    with written_whole(path) as part:
        part.write_text(markdown(device, rows), encoding="utf-8")


def _summary(rows: Sequence[Row], planned: int, out: Path) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "FAILED", "skipped")}
    missing = f", {planned - len(rows)} not run" if len(rows) < planned else ""
    seconds = sum(row.seconds for row in rows)
    return f"{', '.join(f'{n} {status}' for status, n in counts.items())}{missing}, {seconds:.0f} s; table: {out}"

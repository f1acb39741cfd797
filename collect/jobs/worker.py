"""The process behind a slot: takes jobs as JSON lines on its input, answers on its output, ends with its parent.

Its input ends when the parent closes it, and also when the parent is killed: either way this process is gone at once.
"""

import errno
import importlib
import io
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from collect.jobs import devices
from predictor.errors import UsageError

_SECONDS_BETWEEN_REPORTS = 0.25


def main() -> None:
    """Do jobs until the parent ends."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    _point_output_at(Path(os.devnull))  # only answers go to the parent, whatever a job prints
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log may hold any text, whatever the terminal's encoding
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders.put,), daemon=True).start()
    while True:
        answers.write(_line(_answer(orders.get(), answers.write)))


def _listen(take: Callable[[dict[str, Any]], None]) -> None:
    for line in sys.stdin.buffer:
        take(json.loads(line))
    os._exit(1)  # the main thread may be deep in a training: no clean-up of its own would end it


def _prepare() -> bool:
    """Pin the threads, before each job: the one before may have changed them.

    Returns:
        Whether there is torch. A job whose module does not import it goes without, which saves 0.3 GB.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_flush_denormal(True)
    return True


def _answer(order: dict[str, Any], write: Callable[[bytes], object]) -> dict[str, Any]:
    """Do a job. The answer is `done` or `failed`.

    `crowded`: its GPU had no room. `full`: a disk had none. `spent`: the device refuses all.
    """
    try:
        _point_output_at(Path(order["log"]))
        module, function = order["target"].split(":")
        job = getattr(importlib.import_module(module), function)
        prepared = _prepare()
        write(_line({"began": True}))  # from here its time counts
        print(f"=== {datetime.now().astimezone().isoformat(timespec='seconds')} {order['title']}", flush=True)
        answer = {"done": job(order["payload"], Path(order["folder"]), _reporter(write))}
        _line(answer)  # what cannot be written as JSON fails here, inside the job
        if not prepared and "torch" in sys.modules:
            raise RuntimeError(
                f"{module} imports torch inside a function, where it is not prepared: import it at the top"
            )
        devices.settle()  # and so does a kernel that has not been waited for
    except Exception as error:  # whatever a job raises is the job's failure, and must not end the slot
        traceback.print_exc()
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        answer = {"failed": f"{kind}{error}".strip().replace("\n", " ")}
        if devices.is_crowded(error):
            answer["crowded"] = True
        if _is_full(error):
            answer["full"] = True
    # The error is gone here, and with it what its frames held.
    if not devices.clean_up():
        answer["spent"] = True
    sys.stdout.flush()
    sys.stderr.flush()
    return answer


def _is_full(error: BaseException | None) -> bool:
    """Whether a job failed because a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reporter(write: Callable[[bytes], object]) -> Callable[[float], None]:
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            write(_line({"share": float(share)}))

    return report


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _point_output_at(path: Path) -> None:
    """Send everything that this process prints, from Python or below it, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    main()

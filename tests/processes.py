"""Other processes: whether one still runs, and waiting for what they do."""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen


def running(pid: int) -> bool:
    """Whether a process of this id is there and has not ended. One that was sent SIGKILL may run a moment longer."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], process: Popen[bytes] | None = None, seconds: float = 240) -> None:
    """Wait until a condition holds. It must come while `process`, where one is given, is running."""
    last = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "ended too early"
        assert time.monotonic() < last, "waited in vain"
        time.sleep(0.01)

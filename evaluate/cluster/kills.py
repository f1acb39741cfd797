"""Runs a command on a cluster until it has succeeded, and kills nodes, processes and the command itself meanwhile."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluate.cluster.nodes import HEAD, WORKERS, Nodes

_SECONDS_BETWEEN = (3.0, 9.0)
_KINDS = {"node": 4, "job": 2, "worker": 2, "driver": 2}
"""What is killed, and how often beside the others: all of a node, the process of a job, Ray's process above it, and the
command itself."""
_MOST_STARTS = 12
"""Of a command that was not killed, and fails."""


@dataclass
class Killer:
    """Draws what is killed next, and when."""

    seed: int
    left: int
    """How many more."""
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def pause(self) -> float:
        """Seconds until the next kill."""
        return self._random.uniform(*_SECONDS_BETWEEN)

    def strike(self, nodes: Nodes, driver: "subprocess.Popen[bytes]") -> None:
        """Kill something. Where there is nothing of that kind, nothing is."""
        kind = self._random.choices(list(_KINDS), list(_KINDS.values()))[0]
        name = self._random.choice(WORKERS if kind == "node" else (HEAD, *WORKERS))
        if kind == "driver":
            os.killpg(driver.pid, signal.SIGKILL)
        elif kind == "node":
            nodes.kill(name)
            nodes.start(name)
        else:
            found = nodes.processes(name, _is_worker if kind == "worker" else _is_job)
            if not found:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(found), signal.SIGKILL)
        self.done[kind] += 1
        self.left -= 1


def _is_job(command: str) -> bool:
    return "collect.jobs.worker" in command


def _is_worker(command: str) -> bool:
    """Whether it is a process of Ray's that runs a job or our mailbox."""
    return command.startswith("ray::") and "Agent" not in command and "IDLE" not in command


def run_under_kills(nodes: Nodes, command: Sequence[str], log: Path, killer: Killer, at_most: int) -> str:
    """Run a command again and again until it succeeds.

    Args:
        nodes: The cluster; the command runs on its head.
        command: What to run.
        log: Where its output goes.
        killer: Kills meanwhile.
        at_most: How many kills.

    Returns:
        Why it did not succeed; empty where it did.
    """
    stop_at = max(0, killer.left - at_most)
    failures = 0
    while failures < _MOST_STARTS:
        driver = nodes.popen(HEAD, command, log)
        following = time.monotonic() + killer.pause
        try:
            while driver.poll() is None:
                time.sleep(0.05)
                if killer.left > stop_at and time.monotonic() > following:
                    killer.strike(nodes, driver)
                    following = time.monotonic() + killer.pause
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        if driver.returncode == 0:
            return ""
        failures += driver.returncode > 0
    return f"failed {failures} times: see {log}"

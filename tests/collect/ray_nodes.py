"""Ray nodes as processes of this machine, each a process group that a test may kill."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.processes import wait_for

CHECKOUT = Path(__file__).parents[2]
_RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]

SECONDS = 900
"""Nobody waits so long, unless something hangs."""
_STARTS = 10


class Cluster:
    """A head that runs no jobs, and nodes. It asks for a token that nobody else has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(CHECKOUT),
            "TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "RAY_health_check_period_ms": "1000",  # a node that is killed is found out soon
            # On a busy machine all takes longer.
            "RAY_agent_register_timeout_ms": "600000",
            "RAY_worker_register_timeout_seconds": "120",
        }
        self._names: dict[int, str] = {}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def start_head(self) -> None:
        """Start the node that the others join."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        head = ["--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0", f"--temp-dir={self.folder}"]
        log = self._start("head", head)

        def printed() -> re.Match[str] | None:
            return re.search(rf"address='(\S+:{port})'", re.sub(r"\x1b\[\d+m", "", log.read_text()))

        wait_for(lambda: printed() is not None, seconds=SECONDS)  # some lines after "runtime started"
        found = printed()
        assert found
        self.address = found[1]

    def add_node(self, name: str, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start a node with 1 GB to give to jobs, which find its name in the variable NODE."""
        # In a shared folder one node may find another's half of the sent code, and its worker dies.
        own = ["--memory=1000000000", f"--temp-dir={self.folder / name}"]
        self._start(name, [f"--address={self.address}", f"--num-cpus={cpus}", *own], NODE=name)
        self._names[self._nodes[-1].pid] = name
        return self._nodes[-1]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node, as when its power fails: also jobs, which have groups of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        if name := self._names.get(node.pid):
            self._end_all(f"NODE={name}\0")

    def close(self) -> None:
        """End everything, also what has left the nodes' process groups: all of it has our token."""
        for node in reversed(self._nodes):
            self.kill(node)
        self._end_all()

    def _end_all(self, variable: str = "") -> None:
        """End all processes that have our token, and this in their environment."""
        while left := [pid for pid in map(_number, Path("/proc").glob("[0-9]*")) if self._is_ours(pid, variable)]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _is_ours(self, pid: int, variable: str) -> bool:
        try:
            found = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # ended, or another user's
            return False
        return self.environment["RAY_AUTH_TOKEN"].encode() in found and variable.encode() in found

    def _start(self, name: str, arguments: list[str], **more: str) -> Path:
        """Start a node, again where Ray's 30 seconds for that were too few. Returns its log."""
        log = self.folder / f"{name}.log"
        for _ in range(_STARTS):
            node = self._start_once(log, arguments, more)
            wait_for(lambda node=node: node.poll() is not None or "runtime started" in log.read_text(), seconds=SECONDS)
            if node.poll() is None:
                return log
            self.kill(node)
        raise AssertionError(f"Ray does not start: {log.read_text()}")

    def _start_once(self, log: Path, arguments: list[str], more: dict[str, str]) -> "subprocess.Popen[bytes]":
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*_RAY, *arguments],
                env={**self.environment, **more},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._nodes.append(process)
        return process


def _number(path: Path) -> int:
    return int(path.name)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster whose processes all end with the block. The path of its folder is short, as sockets need it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)

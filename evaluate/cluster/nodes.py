"""Ray nodes on this machine: each a process group in a network namespace, with its own view of the file system."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from predictor.errors import UsageError

HEAD = "head"
WORKERS = ("one", "two")
_CHECKOUT = Path(__file__).parents[2]
_NET = "10.213.77"
_PORT = 6379
_SECONDS_TO_START = 120.0


class Nodes:
    """A head and two more nodes. None of them sees the folder into which the driver writes.

    Args:
        folder: What the nodes keep. Its path is short, for sockets lie below it.
        hidden: The folder that no node is to see.
        logs: Where their output goes.
    """

    def __init__(self, folder: Path, hidden: Path, logs: Path) -> None:
        self._folder, self._hidden, self._logs = folder, hidden, logs
        self._prefix = f"sfz{os.getpid()}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"{_NET}.1:{_PORT}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(_CHECKOUT),
            "OMP_NUM_THREADS": "1",
            # A node that is killed is found out in seconds.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }

    def create(self) -> None:
        """Make the namespaces, with a bridge between them."""
        bridge = self._namespace("net")
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "addr", "add", f"{_NET}.254/24", "dev", "br0")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for number, name in enumerate((HEAD, *WORKERS), start=1):
            own = self._namespace(name)
            _ip("link", "add", f"v{number}", "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", bridge, "link", "set", f"v{number}", "master", "br0", "up")
            _ip("-n", own, "addr", "add", f"{_NET}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", own, "link", "set", device, "up")
            _ip("-n", own, "route", "add", "default", "via", f"{_NET}.254")  # Ray asks the route for its own address

    def start(self, name: str, disk: str = "1g") -> None:
        """Start a node. disk: the size of the disk that its jobs work on."""
        number = (HEAD, *WORKERS).index(name) + 1
        scratch = self._made("scratch")
        views = [f"mount -t tmpfs tmpfs '{self._hidden}'", f"mount -t tmpfs -o size={disk} tmpfs '{scratch}'"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
        ray += [f"--node-ip-address={_NET}.{number}", "--object-store-memory=200000000", "--memory=4000000000"]
        if name == HEAD:  # the driver speaks with it through sockets below this folder
            ray += ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={self._made('ray')}"]
        else:
            views.append(f"mount -t tmpfs tmpfs '{self._made('ray')}'")
            ray.append(f"--address={self.address}")
        own_view = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        script = f'{" && ".join(views)} && exec "$@"'
        environment = {**self.environment, "TMPDIR": str(scratch), "NODE": name}
        self._running[name] = self.popen(name, [*own_view, script, "sh", *ray], self._logs / f"{name}.log", environment)

    def wait(self, name: str) -> None:
        """Wait until a node has started. Raises UsageError where it does not."""
        log, end = self._logs / f"{name}.log", time.monotonic() + _SECONDS_TO_START
        while "runtime started" not in log.read_text(errors="replace"):
            if self._running[name].poll() is not None or time.monotonic() > end:
                raise UsageError(f"node {name} does not start: see {log}")
            time.sleep(0.1)

    def popen(
        self, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a node, in a process group of its own."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"{self._prefix}-{name}", *command],
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                env=environment or self.environment,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kill all processes of a node at once, as when its power fails."""
        node = self._running.pop(name)
        for pid in self.processes(name, lambda command: True) if name != HEAD else ():
            _kill(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def processes(self, name: str, wanted: Callable[[str], bool]) -> list[int]:
        """The processes of a node whose command line is wanted."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"{self._prefix}-{name}"], capture_output=True, text=True, check=True
        )
        found = []
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):
                if wanted(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")):
                    found.append(pid)
        return found

    def close(self) -> None:
        """End everything, and remove the namespaces."""
        for name in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running[name].pid, signal.SIGKILL)
        for name in ("net", HEAD, *WORKERS):
            own = f"{self._prefix}-{name}"
            with contextlib.suppress(subprocess.SubprocessError):
                for pid in self.processes(name, lambda command: True):
                    _kill(pid)
                _ip("netns", "del", own)

    def _namespace(self, name: str) -> str:
        own = f"{self._prefix}-{name}"
        _ip("netns", "add", own)
        return own

    def _made(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path


def why_not() -> str:
    """Why this machine cannot have such nodes; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces (`ip netns`) need root: run the command as root, or in a container that may"
    missing = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (Debian's iproute2, util-linux and mount)"
    name = f"sfz{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


@contextlib.contextmanager
def running_nodes(hidden: Path, logs: Path) -> Iterator[Nodes]:
    """Three nodes, which end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="sfz", dir="/tmp"))
    nodes = Nodes(folder, hidden, logs)
    try:
        nodes.create()
        nodes.start(HEAD)
        nodes.wait(HEAD)
        for name in WORKERS:
            nodes.start(name)
        for name in WORKERS:
            nodes.wait(name)
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

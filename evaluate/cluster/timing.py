"""What Ray costs beside this machine's own slots, and whether a driver keeps many slots busy. Nothing else may run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from predictor.errors import UsageError

if TYPE_CHECKING:
    from evaluate.cluster.command import Bench

_PAIRS = 3
_MOST_OVERHEAD = 0.03
_JOBS, _SLOTS, _SLEEP = 2000, 64, 20.0
_LEAST_BUSY, _MOST_BYTES = 0.95, 1 << 30

_SIMULATION = """
import json, resource, sys
from pathlib import Path
from collect.jobs.engine import Job
from collect.jobs.ray import RayEngine
address, folder, count, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
jobs = [Job(f"job-{n}", f"job {n}", "evaluate.cluster.timing:sleep", {"seconds": seconds}) for n in range(count)]
spans = []
def report(job, event):
    if "done" in event or "failed" in event:
        spans.append(event.get("done"))
if __name__ == "__main__":
    RayEngine(address, cpus=1.0).run(jobs, folder, lambda name: folder / "logs" / f"{name}.log", report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "spans.json").write_text(json.dumps({"spans": spans, "peak": peak}))
"""


def sleep(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """A job that does nothing for a while, and says from when to when."""
    start = time.time()
    while (left := start + payload["seconds"] - time.time()) > 0:
        time.sleep(min(left, 1.0))
        progress(1 - left / payload["seconds"])
    return {"start": start, "end": time.time()}


def busy_share(spans: list[tuple[float, float]], slots: int) -> float:
    """The share of the time that slots were busy, from when all had begun to when the last job did."""
    starts = sorted(start for start, _ in spans)
    since, until = starts[slots - 1], starts[-1]
    busy = sum(max(0.0, min(end, until) - max(start, since)) for start, end in spans)
    return busy / (slots * (until - since))


def _overhead(bench: "Bench") -> tuple[str, str]:
    """The demo's gathering with two slots of Ray and of this machine, in turn."""
    with _one_node(bench, 2) as address:
        seconds: dict[str, list[float]] = {"local": [], "ray": []}
        for number in range(_PAIRS):
            for engine, times in seconds.items():
                out = bench.results(f"overhead-{engine}-{number}")
                more = ["--engine", "ray", "--address", address] if engine == "ray" else []
                start = time.monotonic()
                why = bench.alone(
                    "overhead", "collect", "gather", "trajectories", "--slots", "2", "--out", str(out), *more
                )
                times.append(time.monotonic() - start)
                if why:
                    return why, ""
    local, ray = median(seconds["local"]), median(seconds["ray"])
    line = f"{ray:.0f} s with Ray, {local:.0f} s with this machine's slots: {ray / local - 1:+.1%}"
    return (line if ray / local - 1 > _MOST_OVERHEAD else ""), f"{line} (at most {_MOST_OVERHEAD:.0%})"


def _scale(bench: "Bench") -> tuple[str, str]:
    """Jobs that sleep, on slots that this machine does not have."""
    out = bench.results("scale")
    out.mkdir()
    with _one_node(bench, _SLOTS) as address, bench.log("scale").open("ab") as log:
        command = [sys.executable, "-c", _SIMULATION, address, str(out), str(_JOBS), str(_SLEEP)]
        done = subprocess.run(command, stdout=log, stderr=log, env=bench.nodes.environment)
    if done.returncode:
        return f"failed: see {bench.log('scale')}", ""
    found = json.loads((out / "spans.json").read_text())
    share = busy_share([(span["start"], span["end"]) for span in found["spans"] if span], _SLOTS)
    line = (
        f"{len(found['spans'])} jobs kept {_SLOTS} slots {share:.1%} busy; the driver had {found['peak'] / 1e6:.0f} MB"
    )
    good = share >= _LEAST_BUSY and found["peak"] < _MOST_BYTES and all(found["spans"])
    return ("" if good else line), line


@contextlib.contextmanager
def _one_node(bench: "Bench", slots: int) -> Iterator[str]:
    """A Ray node of this machine with as many slots as are wanted. Yields its address."""
    log = bench.log("one-node")
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="sfz", dir="/tmp") as folder, log.open("ab") as file:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=6390"]
        command += [f"--num-cpus={slots}", f"--temp-dir={folder}", "--include-dashboard=false"]
        node = subprocess.Popen(command, stdout=file, stderr=file, env=bench.nodes.environment, start_new_session=True)
        try:
            while "runtime started" not in (text := log.read_text(errors="replace")):
                if node.poll() is not None:
                    raise UsageError(f"Ray does not start: see {log}")
                time.sleep(0.1)
            found = re.search(r"[\w.]+:6390", text)
            assert found is not None, log
            yield found[0]
        finally:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


CHECKS: dict[str, Callable[["Bench"], tuple[str, str]]] = {"overhead": _overhead, "scale": _scale}

"""The engine of a Ray cluster, on a real one: two nodes of this machine. One is killed in mid-run."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from collect import __main__ as program
from data.trajectories.folder import GatherFolder
from predictor import __main__ as predictor
from tests.collect.gather.test_gather_kill import SUITE, WORKLOAD, assert_same, gather
from tests.collect.inline import put_inline
from tests.collect.ray_nodes import SECONDS, Cluster, running_cluster
from tests.collect.search.test_fold_jobs import trials as trials_of
from tests.predictor.conftest import write_trajectories  # noqa: F401
from tests.processes import running, wait_for

pytest.importorskip("ray")

JOBS = """
import errno, json, os, signal, time
from pathlib import Path

import torch

def note(payload, what):
    with open(Path(payload["notes"]) / what, "a") as file:
        file.write(payload["name"])

def describe(payload, folder, progress):
    note(payload, "order")
    print("said by", payload["name"])
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / payload["name"]).write_text("whole")
    return {"threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"], "node": os.environ["NODE"],
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "own": str(folder) != payload["notes"],
            "token": "RAY_AUTH_TOKEN" in os.environ["EXTRA"]}

def fail(payload, folder, progress):
    note(payload, "tries")
    raise KeyError("a fault")

def die_at_first(payload, folder, progress):
    state = folder / "states" / payload["name"]
    if state.exists():
        return {"state": state.read_text()}
    state.parent.mkdir(exist_ok=True)
    state.write_text("kept")
    os.kill(os.getpid(), signal.SIGKILL)

def always_die(payload, folder, progress):
    note(payload, "deaths")
    os._exit(3)

def hang(payload, folder, progress):
    note(payload, "hung")
    time.sleep(1000)

def fill_a(payload, folder, progress):
    if os.environ["NODE"] == "a":
        raise OSError(errno.ENOSPC, "No space left on device")
    return {"node": os.environ["NODE"]}

def read(payload, folder, progress):
    found = {name: (folder / name).read_text() for name in ("a.txt", "some/deep/b.txt")}
    return {**found, "own": str(folder) != payload["notes"], "again": payload.get("again", 0)}

def linger(payload, folder, progress):
    (Path(payload["notes"]) / f"pid-{payload['name']}").write_text(str(os.getpid()))
    time.sleep(1000)
"""
DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from collect.jobs.engine import Job
from collect.jobs.ray import RayEngine
settings, jobs, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
events = open(folder / "events", "a")
def report(job, event):
    if "share" not in event:
        print(json.dumps([job.id, event]), file=events, flush=True)
        again = job.payload.get("again", 0)
        if again:
            return dataclasses.replace(job, payload={**job.payload, "again": again - 1})
if __name__ == "__main__":
    RayEngine(**settings).run([Job(**job) for job in jobs], folder, lambda name: folder / "logs" / name, report)
"""
GATED = """
import os, time

class Gate(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        while self.calls > 30 and not os.path.exists(os.environ.get("SMARTFRZ_GATE", "/")):
            time.sleep(0.01)
        return x
"""
"""A layer that holds a training in its middle until a file is there."""
GATHER = """
import functools, sys
import collect.jobs.ray as engine
engine.RayEngine = functools.partial(engine.RayEngine, looks_for_shared=False)
from collect.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        cluster.add_node("a", cpus=2)
        yield cluster


@pytest.fixture(scope="module")
def doomed(cluster: Cluster) -> "subprocess.Popen[bytes]":
    """A second node, that one of the tests kills."""
    return cluster.add_node("b", cpus=2)


def start(cluster: Cluster, script: str, folder: Path, *arguments: str, **more: str) -> "subprocess.Popen[bytes]":
    path = folder / "driver.py"
    path.write_text(script)
    with (folder / "printed").open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(path), *arguments],
            cwd=folder,
            env={**cluster.environment, "TMPDIR": str(cluster.folder), **more},
            stdout=printed,
            stderr=printed,
        )


def start_jobs(
    cluster: Cluster,
    folder: Path,
    settings: dict[str, Any],
    *functions: str,
    payload: Mapping[str, Any] = MappingProxyType({}),
    inputs: Mapping[str, str] = MappingProxyType({}),
    **more: str,
) -> "subprocess.Popen[bytes]":
    (folder / "rayjobs.py").write_text(JOBS)
    (folder / "out").mkdir(exist_ok=True)
    jobs = [
        {
            "id": name,
            "title": f"job {name}",
            "target": f"rayjobs:{function}",
            "payload": {"name": name, "notes": str(folder / "out"), **payload},
            "files": [f"states/{name}"],
            "inputs": dict(inputs),
        }
        for name, function in zip("abcdefgh", functions, strict=False)
    ]
    settings = {"address": cluster.address, "environment": {"EXTRA": "yes"}, **settings}
    return start(cluster, DRIVER, folder, json.dumps(settings), json.dumps(jobs), str(folder / "out"), **more)


def events(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    path = folder / "out" / "events"
    for line in path.read_text().splitlines() if path.exists() else []:
        job, event = json.loads(line)
        found.setdefault(job, []).append(event)
    return found


def ends_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {job: [event for event in found if "note" not in event] for job, found in events(folder).items()}


def printed(folder: Path) -> str:
    return (folder / "printed").read_text()


def test_jobs_run_fail_die_and_hang(cluster: Cluster, tmp_path: Path) -> None:
    """Each ends once, and one that failed by itself is not tried again."""
    functions = ("hang", "describe", "fail", "die_at_first", "always_die", "describe")
    settings = {"looks_for_shared": False, "run_timeout": 10.0, "attempts": 3}
    driver = start_jobs(cluster, tmp_path, settings, *functions)
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    ends = ends_of(tmp_path)
    assert {job: len(found) for job, found in ends.items()} == dict.fromkeys("abcdef", 1)
    described = {"threads": 1, "omp": "1", "node": "a", "gpus": "", "own": True, "token": False}
    assert ends["b"] == ends["f"] == [{"done": described}]
    assert "--run-timeout 10" in ends["a"][0]["failed"]
    assert "'a fault'" in ends["c"][0]["failed"]
    assert ends["d"] == [{"done": {"state": "kept"}}]
    assert "exit status 3" in ends["e"][0]["failed"]
    out = tmp_path / "out"
    assert (out / "order").read_text() == "bf"
    assert (out / "tries").read_text() == "c"
    assert (out / "deaths").read_text() == "e" * 3
    assert (out / "hung").read_text() == "a"
    assert (out / "results" / "b").read_text() == "whole"
    assert "said by b\n" in (out / "logs" / "b").read_text()
    assert "Traceback" in (out / "logs" / "c").read_text()
    assert cluster.environment["RAY_AUTH_TOKEN"] not in "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )


def test_on_shared_storage_a_job_works_in_the_folder_itself(cluster: Cluster, tmp_path: Path) -> None:
    driver = start_jobs(cluster, tmp_path, {}, "describe", "die_at_first")
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    ends, out = ends_of(tmp_path), tmp_path / "out"
    assert [event["done"]["own"] for event in ends["a"]] == [False]
    assert ends["b"] == [{"done": {"state": "kept"}}]
    assert (out / "results" / "a").read_text() == "whole"
    assert "said by a\n" in (out / "logs" / "a").read_text()
    assert not list(out.glob(".shared"))


def test_what_jobs_only_read_is_sent_to_them_and_to_those_that_follow(cluster: Cluster, tmp_path: Path) -> None:
    """Also on shared storage, which need not hold it."""
    deep = tmp_path / "elsewhere" / "deep"
    deep.mkdir(parents=True)
    (deep / "b.txt").write_text("of a folder")
    (tmp_path / "any.txt").write_text("of a file")
    inputs = {"a.txt": str(tmp_path / "any.txt"), "some": str(tmp_path / "elsewhere")}
    driver = start_jobs(cluster, tmp_path, {"slots": 1}, "read", "read", payload={"again": 2}, inputs=inputs)
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    found = {"a.txt": "of a file", "some/deep/b.txt": "of a folder", "own": True}
    for ends in ends_of(tmp_path).values():
        assert ends == [{"done": {**found, "again": left}} for left in (2, 1, 0)]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name not in ("events", "logs")]


def test_a_search_on_the_cluster_is_that_of_one_machine(
    cluster: Cluster,
    tmp_path: Path,
    write_trajectories: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, with one trial at a time."""
    monkeypatch.setattr("predictor.training.plots.study", lambda *_: [])
    quick = ["--epochs", "1", "--epoch-windows", "256", "--device", "cpu", "--folds", "3", "--held-out", "none"]
    command = ["tune", "--data", str(write_trajectories()), "--trials", "2", *quick]
    there = ["--engine", "ray", "--address", cluster.address, "--slots", "1", "--out", str(tmp_path / "there")]
    driver = start(cluster, "from predictor.__main__ import main\nmain()", tmp_path, *command, *there)
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    predictor.main([*command, "--out", str(tmp_path / "here")])
    assert trials_of(tmp_path / "there") == trials_of(tmp_path / "here")


def test_nobody_without_the_token(cluster: Cluster, tmp_path: Path) -> None:
    driver = start_jobs(cluster, tmp_path, {}, "describe", RAY_AUTH_TOKEN="0123456789abcdef")
    assert driver.wait(SECONDS) == 1
    assert "UsageError" in printed(tmp_path)
    assert "ray get-auth-token" in printed(tmp_path)
    assert not events(tmp_path)
    assert not (tmp_path / "out" / "order").exists()


def test_jobs_end_with_their_driver(cluster: Cluster, tmp_path: Path) -> None:
    """Whether it is killed or interrupted."""
    drivers = {}
    for sent in (signal.SIGKILL, signal.SIGINT):
        folder = tmp_path / sent.name
        folder.mkdir()
        drivers[sent] = start_jobs(cluster, folder, {"slots": 1}, "linger"), folder / "out" / "pid-a"
    for sent, (driver, pid) in drivers.items():
        wait_for(lambda pid=pid: pid.exists() and bool(pid.read_text()), driver, SECONDS)
        driver.send_signal(sent)
    for driver, pid in drivers.values():
        driver.wait(SECONDS)
        wait_for(lambda pid=pid: not running(int(pid.read_text())), seconds=SECONDS)


@pytest.mark.usefixtures("doomed")
def test_a_node_with_a_full_disk_gets_no_more_jobs(cluster: Cluster, tmp_path: Path) -> None:
    driver = start_jobs(cluster, tmp_path, {"looks_for_shared": False, "slots": 3}, *["fill_a"] * 6)
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    assert list(ends_of(tmp_path).values()) == [[{"done": {"node": "b"}}]] * 6
    notes = [event["note"] for found in events(tmp_path).values() for event in found if "note" in event]
    assert (
        1 <= sum("is full" in note for note in notes) <= 3
    )  # those that ran there at that time: the other has room for 2


def test_a_run_whose_node_dies_goes_on_elsewhere(
    cluster: Cluster, doomed: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is gathered equals what one machine gathers, bit for bit."""
    suite, gate = tmp_path / "tiny.toml", tmp_path / "gate"
    suite.write_text(SUITE)
    (tmp_path / "tinywork.py").write_text(WORKLOAD.replace("nn.Flatten()", "nn.Flatten(), Gate()") + GATED)
    files = GatherFolder(tmp_path / "broken" / "trajectories")
    own = ["--engine", "ray", "--address", cluster.address, "--memory-per-run", "0.8"]  # one run a node
    driver = start(cluster, GATHER, tmp_path, *gather(suite, tmp_path / "broken"), *own, SMARTFRZ_GATE=str(gate))
    wait_for(lambda: len(list((files.root / "checkpoints").glob("*.pt"))) > 1, driver, SECONDS)  # on both nodes
    cluster.kill(doomed)
    gate.touch()
    assert driver.wait(SECONDS) == 0, printed(tmp_path)
    assert "died; goes on at" in printed(tmp_path)
    assert not list((files.root / "checkpoints").iterdir())

    put_inline(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    suite.write_text(SUITE.replace("checkpoint_seconds = 0", "checkpoint_seconds = 1000"))
    assert program.main(gather(suite, tmp_path / "whole")) == 0
    assert_same(tmp_path / "whole" / "trajectories.h5", tmp_path / "broken" / "trajectories.h5")

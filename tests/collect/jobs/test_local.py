"""The engine: order, failures, deaths of either side, what a slot finds in its environment."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collect.jobs import Job, JobOptions, default_slots, run_jobs, visible_gpus
from collect.jobs.engine import Event
from collect.jobs.local import LocalEngine, free_cores, slot_environments
from collect.jobs.process import WorkerProcess, process_environment
from predictor.errors import UsageError
from tests.processes import running, wait_for

JOBS = """
import json, os, signal, subprocess, sys, time
import torch

def describe(payload, folder, progress):
    print("said by", payload["name"])
    subprocess.run(["echo", "said by a child"], check=True)
    (folder / "order").open("a").write(payload["name"])
    progress(0.5)
    return {"name": payload["name"], "threads": torch.get_num_threads(), "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "omp": os.environ["OMP_NUM_THREADS"], "pid": os.getpid(), "flushed": float(torch.tensor(1e-42) * 1) == 0.0}

def change_threads(payload, folder, progress):
    torch.set_num_threads(3)
    return {}

def print_any_text(payload, folder, progress):
    print("\\u0394 \\ud800")
    return {}

def fail(payload, folder, progress):
    raise KeyError("a fault")

def misuse(payload, folder, progress):
    from predictor.errors import UsageError
    raise UsageError("rate=-1: give a positive one")

def unwritable(payload, folder, progress):
    return {"value": object()}

def die(payload, folder, progress):
    os.kill(os.getpid(), signal.SIGKILL)

def leave(payload, folder, progress):
    os._exit(3)

class Held:
    def __init__(self, folder):
        self.folder = folder

    def __del__(self):
        (self.folder / "given-back").touch()

def overfill(payload, folder, progress):
    held = Held(folder)
    with (folder / "tries").open("a") as file:
        file.write(payload["name"] + os.environ["CUDA_VISIBLE_DEVICES"])
    raise torch.OutOfMemoryError("CUDA out of memory")

def fit_if_alone(payload, folder, progress):
    if not (folder / "tries").exists():
        overfill(payload, folder, progress)
    return {}

def break_device(payload, folder, progress):
    import collect.jobs.devices
    class Broken:
        @staticmethod
        def synchronize():
            raise RuntimeError("CUDA error: device-side assert triggered")
    collect.jobs.devices._in_use = lambda: iter([Broken])
    return {"pid": os.getpid()}

def see_given_back(payload, folder, progress):
    return {"given_back": (folder / "given-back").exists(), "pid": os.getpid()}

def linger(payload, folder, progress):
    (folder / f"pid-{payload['name']}").write_text(str(os.getpid()))
    while True:
        sum(range(100_000))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "enginejobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


class Outcome:
    def __init__(self) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def on_done(self, job: Job, result: dict[str, Any]) -> None:
        self.done[job.id] = result

    def on_failed(self, job: Job, error: str) -> None:
        self.failed[job.id] = error


def run(folder: Path, *functions: str, slots: int = 1, **options: Any) -> Outcome:
    jobs = [
        Job(name, f"job {name}", f"enginejobs:{function}", {"name": name})
        for name, function in zip("abcdefgh", functions, strict=False)
    ]
    outcome = Outcome()
    run_jobs(
        jobs,
        folder=folder,
        slots=slots,
        log=lambda name: folder / f"{name}.log",
        on_done=outcome.on_done,
        on_failed=outcome.on_failed,
        device="cpu",
        **options,
    )
    return outcome


def test_one_slot_runs_jobs_in_order_in_one_pinned_process(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A job that fails costs only itself, and one that changes its threads nothing."""
    outcome = run(
        folder, "describe", "change_threads", "describe", "fail", "misuse", "unwritable", "nonesuch", threads=1
    )
    assert (folder / "order").read_text() == "ac"
    assert list(outcome.done) == ["a", "b", "c"]
    for name in "ac":  # c comes after a job that changed its threads
        result = outcome.done[name]
        assert (result["threads"], result["omp"], result["gpus"], result["flushed"]) == (1, "1", "", True)
        assert result["pid"] == outcome.done["a"]["pid"] != os.getpid()
        text = (folder / f"{name}.log").read_text()
        assert text.startswith("=== 20")
        assert f"job {name}" in text.splitlines()[0]
        assert f"said by {name}\n" in text
        assert "said by a child\n" in text
    assert outcome.failed["d"] == "KeyError: 'a fault'"
    assert outcome.failed["e"] == "rate=-1: give a positive one"
    assert "not JSON serializable" in outcome.failed["f"]
    assert "nonesuch" in outcome.failed["g"]
    assert "Traceback" in (folder / "d.log").read_text()
    printed = capfd.readouterr().out
    assert "said by" not in printed
    assert [line.split(" (")[0] for line in printed.splitlines()][:3] == [f"{n + 1}/7 job {'abc'[n]}" for n in range(3)]


def test_a_log_holds_any_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert list(run(folder, "print_any_text").done) == ["a"]
    assert (folder / "a.log").read_text(encoding="utf-8").splitlines()[1] == "\u0394 \\ud800"


def test_a_process_that_dies_costs_only_its_job_and_is_replaced(folder: Path) -> None:
    outcome = run(folder, "die", "leave", "describe")
    assert "signal 9" in outcome.failed["a"]
    assert "exit status 3" in outcome.failed["b"]
    assert list(outcome.done) == ["c"]


def test_a_process_that_is_killed_between_two_jobs_costs_none(folder: Path) -> None:
    process = WorkerProcess(process_environment(1))
    job = Job("a", "a", "enginejobs:see_given_back", {})
    try:
        first = process.do(job, folder, folder / "log", lambda event: None)
        os.kill(first["done"]["pid"], signal.SIGKILL)
        assert "done" in process.do(job, folder, folder / "log", lambda event: None)
    finally:
        process.end()


def test_a_job_that_takes_too_long_is_ended(folder: Path) -> None:
    """The time that its process takes to start does not count."""
    outcome = run(folder, "linger", "see_given_back", options=JobOptions(run_timeout=0.5))
    assert "--run-timeout 0.5" in outcome.failed["a"]
    assert list(outcome.done) == ["b"]
    assert not running(int((folder / "pid-a").read_text()))


def test_a_job_that_breaks_its_device_fails_and_its_process_is_replaced(folder: Path) -> None:
    """Its kernel failed after its last line: nothing had waited for it."""
    outcome = run(folder, "see_given_back", "break_device", "see_given_back")
    assert "device-side assert" in outcome.failed["b"]
    assert outcome.done["a"]["pid"] != outcome.done["c"]["pid"]
    assert "Traceback" in (folder / "b.log").read_text()


def test_a_job_without_memory_fails_alone_and_gives_back_what_it_held(folder: Path) -> None:
    outcome = run(folder, "see_given_back", "overfill", "see_given_back")
    assert outcome.failed == {"b": "OutOfMemoryError: CUDA out of memory"}
    assert outcome.done["c"] == {"given_back": True, "pid": outcome.done["a"]["pid"]}


def test_a_job_for_which_a_shared_gpu_was_too_full_runs_again_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collect.jobs.local.visible_gpus", lambda device: ("7",))
    outcome = run(folder, "fit_if_alone", "see_given_back", "see_given_back", slots=2)
    assert sorted(outcome.done) == ["a", "b", "c"]
    (folder / "tries").unlink()
    outcome = run(folder, "overfill", "see_given_back", slots=2)
    assert outcome.failed == {"a": "OutOfMemoryError: CUDA out of memory"}
    assert (folder / "tries").read_text() == "a7a7"
    (folder / "tries").unlink()
    run(folder, "overfill", slots=1)
    assert (folder / "tries").read_text() == "a7"  # it was alone


def test_jobs_find_what_else_is_asked_for_in_their_environment(folder: Path) -> None:
    outcome = run(folder, "describe", environment={"OMP_NUM_THREADS": "1", "EXTRA": "yes"})
    assert outcome.done["a"]["omp"] == "1"


def test_a_job_that_follows_another_comes_before_those_that_wait(folder: Path) -> None:
    order = []

    def report(job: Job, event: Event) -> Job | None:
        if "share" in event:
            return None
        order.append(job.id)
        left = job.payload["name"]
        return Job(f"{job.id}+", job.title, job.target, {"name": left[1:]}) if len(left) > 1 else None

    jobs = [Job(name, name, "enginejobs:describe", {"name": name * 3}) for name in "ab"]
    LocalEngine(1).run(jobs, folder, lambda name: folder / "logs" / name, report)
    assert order == ["a", "a+", "a++", "b", "b+", "b++"]
    order.clear()
    LocalEngine(2).run(jobs[:1], folder, lambda name: folder / "logs" / name, report)
    assert order == ["a", "a+", "a++"]


def test_a_job_gets_torch_where_its_module_imports_it(folder: Path) -> None:
    """Imported later it would have other threads and round otherwise, so that is refused."""
    source = "import sys\ndef look(*_): return {'torch': 'torch' in sys.modules}\ndef slip(*_): import torch; return {}"
    (folder / "lightjobs.py").write_text(source)
    jobs = [Job(name, name, f"lightjobs:{name}", {}) for name in ("look", "slip")]
    engine = LocalEngine(1)
    ends: dict[str, Event] = {}
    engine.run(jobs, folder, lambda name: folder / "logs" / name, lambda job, event: ends.update({job.id: event}))
    assert ends["look"] == {"done": {"torch": False}}
    assert "import it at the top" in ends["slip"]["failed"]


def test_no_jobs_and_no_slots(folder: Path) -> None:
    assert not run(folder).done
    with pytest.raises(UsageError, match="slots=0"):
        run(folder, "describe", slots=0)


def test_an_exception_in_a_callback_ends_the_slots(folder: Path) -> None:
    pids: list[int] = []

    def refuse(job: Job, result: dict[str, Any]) -> None:
        pids.append(result["pid"])
        raise UsageError("the disk is full")

    with pytest.raises(UsageError, match="disk"):
        run_jobs(
            [Job("a", "a", "enginejobs:describe", {"name": "a"}), Job("b", "b", "enginejobs:linger", {"name": "b"})],
            folder=folder,
            slots=1,
            log=lambda name: folder / f"{name}.log",
            on_done=refuse,
            on_failed=lambda job, error: None,
            device="cpu",
        )
    assert not running(pids[0])


PARENT = """
import sys
from pathlib import Path
from collect.jobs import Job, run_jobs
folder = Path(sys.argv[1])
jobs = [Job(name, name, "enginejobs:linger", {"name": name}) for name in "ab"]
try:
    run_jobs(jobs, folder=folder, slots=2, log=lambda name: folder / name, device="cpu",
             on_done=lambda job, result: None, on_failed=lambda job, error: None)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_slots_end_with_their_parent(folder: Path, sent: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder)])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], env=environment)
    files = [folder / "pid-a", folder / "pid-b"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    parent.send_signal(sent)
    assert parent.wait(timeout=20) == (130 if sent == signal.SIGINT else -sent)
    wait_for(lambda: not any(running(int(file.read_text())) for file in files))


def test_environments_divide_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collect.jobs.local.free_cores", lambda: 8)
    monkeypatch.setattr("collect.jobs.local.visible_gpus", lambda device: ("3", "5"))
    slots = slot_environments(4, threads=None, device="auto")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "5", "3", "5"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"2"}
    assert slot_environments(16, threads=None, device="auto")[0]["MKL_NUM_THREADS"] == "1"
    assert slot_environments(1, threads=5, device="auto")[0]["OMP_NUM_THREADS"] == "5"
    assert default_slots("auto") == 2


def test_gpus_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-abc")
    assert visible_gpus("auto") == ("6", "GPU-abc")
    assert visible_gpus("cuda:1") == ("GPU-abc",)
    assert visible_gpus("cpu") == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listing(monkeypatch, None)
    assert visible_gpus("cuda") == ("0", "1")
    with pytest.raises(UsageError, match="2 GPU"):
        visible_gpus("cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus("auto") == ()
    assert default_slots("auto") == free_cores()
    with pytest.raises(UsageError, match="--device cpu"):
        visible_gpus("cuda")


MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-7089d0f3)
  MIG 3g.20gb     Device  1: (UUID: MIG-c6d4f1ef)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4f3b2a1c)
GPU 2: NVIDIA A30 (UUID: GPU-00000000)
  MIG 1g.6gb      Device  0: (UUID: MIG-GPU-00000000/1/0)
"""
"""What `nvidia-smi -L` prints where GPUs are divided, with an old name of an instance at the end."""


def listing(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    def answer(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        if text is None:
            raise FileNotFoundError("nvidia-smi")
        return subprocess.CompletedProcess([], 0, text)

    monkeypatch.setattr("collect.jobs.gpus.subprocess.run", answer)


def test_each_instance_of_a_divided_gpu_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # a process sees one instance
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listing(monkeypatch, MIG)
    names = ("MIG-7089d0f3", "MIG-c6d4f1ef", "GPU-4f3b2a1c", "MIG-GPU-00000000/1/0")
    assert visible_gpus("auto") == names
    assert visible_gpus("cuda:1") == names[1:2]
    assert default_slots("auto", sharing=True) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a, MIG-b")
    assert visible_gpus("cuda") == ("MIG-a", "MIG-b")
    for text in ("GPU 0: NVIDIA A100 (UUID: GPU-5c89852c)", "No devices found.", "", None):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        listing(monkeypatch, text)
        assert visible_gpus("auto") == ("0",)


@pytest.mark.parametrize(("gigabytes", "cores", "expected"), [(24, 64, 2), (40, 64, 4), (141, 64, 8), (141, 4, 4)])
def test_small_runs_share_a_gpu_as_its_memory_and_the_cores_allow(
    gigabytes: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=gigabytes * 10**9)
    )
    monkeypatch.setattr("collect.jobs.local.free_cores", lambda: cores)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert default_slots("auto", sharing=True) == expected
    assert default_slots("auto") == 2  # what is timed has a GPU for itself


def test_rocm_reads_and_gets_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "6.2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    slots = slot_environments(2, threads=1, device="auto")
    assert [slot["HIP_VISIBLE_DEVICES"] for slot in slots] == ["2", "3"]
    assert [slot["HIP_VISIBLE_DEVICES"] for slot in slot_environments(1, threads=1, device="cpu")] == [""]

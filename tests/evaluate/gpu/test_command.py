"""The command: one line a check, each in a process of its own that cannot take others with it, and a table."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluate.__main__ import main
from evaluate.gpu import command as module
from evaluate.gpu.checks import CHECKS, Check
from evaluate.gpu.command import Settings, run_check, run_checks
from predictor.errors import FileFault, UsageError
from tests.processes import running, wait_for

PROGRAM = """
import json, os, signal, subprocess, sys, time
name, device, answer = sys.argv[1:]
print("a line for the log")
if name == "dies":
    os.kill(os.getpid(), signal.SIGABRT)
if name == "lingers":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["PID"], "w").write(str(child.pid))
    time.sleep(600)
json.dump({"status": "FAILED" if name == "fails" else "skipped" if name == "skips" else "ok",
           "line": f"{device} | {os.environ['CUBLAS_WORKSPACE_CONFIG']}"}, open(answer, "w"))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands in for the process of a check."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PID", str(tmp_path / "pid"))
    monkeypatch.setattr(module, "run_check", lambda *args: run_check(*args, command=[sys.executable, str(path)]))
    return [sys.executable, str(path)]


def put(monkeypatch, *names, seconds=60, without_gpu="cpu"):
    checks = {name: Check("module:function", f"about {name}", seconds, without_gpu) for name in names}
    monkeypatch.setattr(module, "CHECKS", checks)


def test_a_check_that_fails_or_dies_costs_only_its_own_line(program, tmp_path, monkeypatch):
    put(monkeypatch, "fails", "dies", "skips", "works")
    said = []
    out = tmp_path / "deep" / "gpu.md"
    assert run_checks(Settings("cpu", out=out), said.append) == 1
    lines = [line.split()[:2] for line in said[1:-1]]
    assert lines == [["fails", "FAILED"], ["dies", "FAILED"], ["skips", "skipped"], ["works", "ok"]]
    assert "dies.log" in said[2]
    assert "a line for the log" in (tmp_path / "runs" / "gpu" / "dies.log").read_text()
    table = out.read_text()
    assert table.count("\n| ") == 5
    assert r"cpu \| :4096:8" in table
    assert "PyTorch" in table
    assert "no GPU" in table


def test_nothing_failed(program, tmp_path, monkeypatch):
    put(monkeypatch, "works", "skips")
    assert run_checks(Settings("cpu"), lambda line: None) == 0
    assert (tmp_path / "runs" / "gpu.md").exists()


def test_a_check_that_hangs_ends_with_all_that_it_started(program, tmp_path, monkeypatch):
    start = time.monotonic()
    status, line = run_check("lingers", "cpu", 2, program)
    assert (status, time.monotonic() - start < 30) == ("FAILED", True)
    assert "2 seconds" in line
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not running(child))


def test_what_needs_a_gpu_or_more_time_is_skipped(program, tmp_path, monkeypatch):
    put(monkeypatch, "one", without_gpu="")
    said = []
    assert run_checks(Settings("cpu"), said.append) == 0
    assert "skipped needs a GPU" in said[1]
    put(monkeypatch, "one")
    assert run_checks(Settings("cpu", minutes=0.001), said.append) == 0
    assert "--minutes" in said[-2]


def test_misuse_is_told_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="chache"):
        main(["gpu", "--only", "chache"])
    with pytest.raises(UsageError, match="minutes=0"):
        main(["gpu", "--minutes", "0"])
    with pytest.raises(UsageError, match="tpu"):
        main(["gpu", "--device", "tpu"])
    (tmp_path / "file").touch()
    with pytest.raises(FileFault, match="file"):
        main(["gpu", "--out", str(tmp_path / "file" / "gpu.md")])


def test_an_interruption_ends_the_check_and_leaves_a_table(tmp_path):
    code = (
        "from evaluate.gpu.command import *; import sys; run_checks(Settings('cpu', ('frozen-sets', 'samples')), print)"
    )
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    log = tmp_path / "runs" / "gpu" / "frozen-sets.log"
    wait_for(log.exists, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "2 not run" in said
    assert "PyTorch" in (tmp_path / "runs" / "gpu.md").read_text()


def test_every_check_is_there():
    for check in CHECKS.values():
        name, function = check.target.split(":")
        assert (Path(__file__).parents[3] / f"{name.replace('.', '/')}.py").exists()
        assert (
            f"def {function}(device: torch.device) -> str:"
            in (Path(__file__).parents[3] / f"{name.replace('.', '/')}.py").read_text()
        )

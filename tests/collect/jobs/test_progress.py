import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from collect.jobs.progress import JobProgress

CHECKOUT = Path(__file__).parents[3]


def test_shares_of_jobs_under_way_count(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress(4) as progress:
        progress.update("a", 0.5)
        progress.update("b", 7.0)  # a job that takes itself for more than done
        assert progress.done == 1.5
        progress.finish("a", "the first")
        assert progress.done == 2.0
    captured = capsys.readouterr()
    assert captured.out == "1/4 the first (00:00 gone, about 00:00 left)\n"
    assert captured.err == ""


def test_the_nodes_and_gpus_in_use_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress(3) as progress:
        for job, node in (("a", "n1"), ("b", "n2"), ("c", "n2")):
            progress.update(job, 0.5, node, 0.5)
        progress.note("a word")
        progress.finish("a", "the first")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a word"
    assert lines[1].endswith(", 2 running on 1 node and 1 GPUs)")


def test_the_estimate_goes_by_the_share_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 seconds for 1.5 of 4 jobs: 40 a job, 100 for the other 2.5."""
    now = [0.0]
    monkeypatch.setattr("collect.jobs.progress.time.monotonic", lambda: now[0])
    with JobProgress(4) as progress:
        progress.update("b", 0.5)
        now[0] = 60.0
        progress.finish("a", "the first")
    assert capsys.readouterr().out == "1/4 the first (01:00 gone, about 01:40 left)\n"


SCRIPT = """
from collect.jobs.progress import JobProgress
with JobProgress(2) as progress:
    progress.update("a", 0.5)
    progress.finish("a", "the first")
"""


@pytest.mark.parametrize(("rows", "bar"), [(24, True), (0, False)])
def test_a_bar_on_a_terminal_and_lines_on_one_without_a_size(rows: int, bar: bool) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        shown = os.read(ours, 100_000).decode()
    except OSError:  # nothing was written, and the other side is closed
        shown = ""
    os.close(ours)
    assert ("25%" in shown and "0.5/2 runs" in shown) is bar
    assert done.stdout.startswith("1/2 the first")
    assert ("gone, about" in done.stdout) is not bar

"""The parts of the Ray engine that need no cluster: options, what is sent to the nodes, what comes back."""

import argparse
import builtins
from pathlib import Path
from typing import Any

import pytest

from collect.gather.continuation_plan import Choices
from collect.gather.outcomes import Outcomes
from collect.gather.trajectories import Trajectories
from collect.jobs import JobOptions, add_job_options, job_options
from collect.jobs import sent_code as sending
from collect.jobs.ray import RayEngine, _decisive, _refuse_other_versions
from collect.jobs.ray_cluster import connected, import_ray, refuse_open_cluster
from collect.jobs.ray_node import _LOG, _Watch, versions
from collect.jobs.sent_code import copy_code
from data.outcomes.folder import OutcomeFolder
from data.trajectories.folder import GatherFolder
from predictor.errors import UsageError
from predictor.shared.files import written_whole


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"engine": "slurm"}, "slurm"),
        ({"gpus_per_run": 1.0}, "--gpus-per-run 1.0"),
        ({"address": "head:6379"}, "head:6379"),
        ({"engine": "ray", "gpus_per_run": 1.5}, "1.5"),
        ({"engine": "ray", "cpus_per_run": 0.0}, "cpus_per_run=0"),
        ({"run_timeout": -1.0}, "run_timeout=-1"),
    ],
)
def test_options_that_cannot_work_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        JobOptions(**settings)


def test_the_flags_make_the_options_and_the_options_the_engine() -> None:
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    assert job_options(parser.parse_args([])) == JobOptions()
    typed = "--engine ray --gpus-per-run 0.25 --cpus-per-run 2 --memory-per-run 3 --run-timeout 60 --address h:1"
    options = job_options(parser.parse_args(typed.split()))
    engine = options.make_engine(None, None, "auto", {"A": "1"})
    assert engine == RayEngine("h:1", None, 2, 2.0, 0.25, 3_000_000_000, {"A": "1"}, 60.0)
    assert options.device("auto") == "cuda"  # this machine need not have one
    assert options.slots(None, "cuda") is None
    assert options.make_engine(4, 1, "cpu", {}) == RayEngine("h:1", 4, 1, 2.0, 0.0, 3_000_000_000, {}, 60.0)


def test_a_device_on_a_cluster() -> None:
    options = JobOptions("ray")
    assert [options.device(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    for given, other in (("cuda:1", options), ("cuda", JobOptions("ray", gpus_per_run=0.0))):
        with pytest.raises(UsageError, match=given):
            other.device(given)


def test_the_nodes_get_what_decides_numbers_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "RAY_AUTH_TOKEN", "SMARTFRZ_DATA"):
        monkeypatch.setenv(name, "1")
    names = set(_decisive())
    assert {"ONEDNN_MAX_CPU_ISA", "SMARTFRZ_DATA"} <= names
    assert not {"OMP_NUM_THREADS", "RAY_AUTH_TOKEN"} & names  # the engine says how many threads


def test_without_ray_the_error_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"smartfrz\[cluster\]"):
        import_ray()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "127.0.0.1:x"])
def test_an_address_where_nobody_listens(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=address), connected(address, tmp_path):
        pass


def test_a_cluster_without_a_token_is_used_only_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UsageError, match="ray get-auth-token"):
        refuse_open_cluster()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refuse_open_cluster()


def test_other_versions_are_refused_with_both() -> None:
    _refuse_other_versions("n1", versions())
    with pytest.raises(UsageError, match=r"n1.*torch 1\.0 there"):
        _refuse_other_versions("n1", {**versions(), "torch": "1.0"})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a command is typed in, with code, results and what is neither."""
    for name in ("mine.py", "package/part.py", "runs/big.h5", ".git/config", "venv/pyvenv.cfg", "out/a.h5", "a.part"):
        path = tmp_path / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "farmodule.py").write_text("x = 2")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_own_code_is_sent_and_results_are_not(here: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    copy_code(code, ["farmodule"], [here / "out"])
    assert (code / "farmodule.py").read_text() == "x = 2"
    assert (code / "mine.py").exists()
    assert (code / "package" / "part.py").exists()
    assert (code / "collect" / "jobs" / "worker.py").exists()
    assert not (code / "tests").exists()
    assert not (code / "evaluate" / "results").exists()
    assert not {"runs", ".git", "venv", "out", "a.part"} & {path.name for path in code.iterdir()}


def test_too_much_to_send_is_refused_by_name(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "samples.bin").write_bytes(bytes(20_000_000))
    monkeypatch.setattr(sending, "_MOST_BYTES", 20_000_000)
    with pytest.raises(UsageError, match=r"samples\.bin"):
        copy_code(tmp_path / "code", [], [])


def test_what_a_node_needs_of_the_folder_of_a_gathering(tmp_path: Path) -> None:
    trajectories, outcomes = GatherFolder(tmp_path), OutcomeFolder(tmp_path)
    assert Trajectories(trajectories, 300).files_of("a") == (trajectories.checkpoint("a"),)
    assert set(Outcomes(outcomes, Choices()).files_of("a")) == {outcomes.run("a"), outcomes.under_way("a")}
    assert outcomes.so_far("a").parent == outcomes.state("a", 3).parent == outcomes.under_way("a")


def test_changes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "old").write_text("old")
    watch = _Watch(tmp_path)
    assert watch.changes() is None
    with written_whole(tmp_path / "deep" / "new") as part:
        part.write_text("new")
        assert watch.changes() is None  # not whole yet
    (tmp_path / _LOG).write_text("one ")
    (tmp_path / "old").unlink()
    changes = watch.changes()
    assert changes is not None
    assert (changes.files, changes.removed, changes.printed) == ({"deep/new": b"new"}, ("old",), b"one ")
    assert watch.changes() is None
    (tmp_path / _LOG).write_text("one two")
    changes = watch.changes()
    assert changes is not None
    assert (changes.files, changes.printed, changes.offset) == ({}, b"two", 4)
    (tmp_path / "deep" / "new").unlink()
    (tmp_path / "last").write_text("last")
    whole = watch.all_changes()
    assert whole.files == {"last": b"last"}
    assert set(whole.removed) == {"old", "deep/new"}
    assert (whole.printed, whole.offset) == (b"one two", 0)

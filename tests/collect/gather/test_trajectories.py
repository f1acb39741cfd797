"""The command `gather trajectories`: what it does, skips and reads, and what it prints."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collect import __main__ as program
from collect.gather.plan import RunConfig, read_suite
from collect.gather.trajectories import record_run
from collect.training.loop import Training, train
from collect.workloads import Workload
from data.trajectories.folder import GatherFolder
from data.trajectories.reader import TrajectoryFile, open_trajectories
from predictor.errors import FileFault, UsageError
from predictor.shared.files import read_json_lines
from tests.collect.inline import MLP, SMALL, ids_of, put_inline

HEAD = f"checkpoint_seconds = 0\n{SMALL}"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are trained in this process; their ids, in order."""
    return put_inline(monkeypatch)


@pytest.fixture
def suite(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text(HEAD + text)
        return str(path)

    return write


def gather(tmp_path: Path, suite: str, *flags: str) -> int | None:
    return program.main(["gather", "trajectories", "--suite", suite, "--out", str(tmp_path / "out"), *flags])


def packed_ids(tmp_path: Path) -> list[str]:
    with open_trajectories(tmp_path / "out" / "trajectories.h5") as file:
        return list(file.run_ids)


def test_a_run_becomes_a_trajectory(tmp_path: Path, suite: Callable[..., str], trained: list[str]) -> None:
    path = suite(MLP + "seed = 5")
    assert gather(tmp_path, path) == 0
    (run,) = read_suite(path).runs
    with open_trajectories(tmp_path / "out" / "trajectories.h5") as file:
        trajectory = file.read(run.id)
    assert trajectory.config == {**run.as_dict(), "total_steps": 6}
    assert RunConfig.from_dict(trajectory.config).id == run.id
    assert trajectory.step_T.tolist() == [0, 2, 3, 5, 6]
    assert trajectory.weights_TLK.shape == (5, 4, 8)
    assert trajectory.similarity_TL[-1].tolist() == [1.0] * 4
    assert trajectory.outcome["status"] == "finished"
    assert trajectory.outcome["final_accuracy"] == trajectory.outcome["curve"][-1]["test_accuracy"]
    assert set(trajectory.provenance) == {"made", "versions", "hardware"}
    assert trajectory.provenance["versions"]["torch"]
    files = GatherFolder(tmp_path / "out" / "trajectories")
    assert not files.checkpoint(run.id).exists()
    head, row = read_json_lines(files.root / "metrics.jsonl")
    assert head["program"] == "collect"
    assert (row["run"], row["final_accuracy"]) == (run.id, trajectory.outcome["final_accuracy"])


def test_what_is_there_is_not_trained_again_and_every_run_is_decoded_once(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    examine = TrajectoryFile.examine

    def counted(file: TrajectoryFile, run_id: str) -> Any:
        decoded.append(run_id)
        return examine(file, run_id)

    monkeypatch.setattr(TrajectoryFile, "examine", counted)
    path = suite(MLP + "seed = [0, 1]")
    gather(tmp_path, path)
    assert trained == ids_of(path)
    assert Counter(decoded) == dict.fromkeys(ids_of(path), 1)
    trained.clear()
    decoded.clear()
    more = suite(MLP + "seed = [1, 2]", "more")
    gather(tmp_path, more)
    assert trained == ids_of(more)[1:]
    assert Counter(decoded) == dict.fromkeys(ids_of(more), 1)
    # Runs only add up; the packed file holds those of the suite just gathered.
    assert len(GatherFolder(tmp_path / "out" / "trajectories").runs) == 3
    assert packed_ids(tmp_path) == sorted(ids_of(more))


def test_a_damaged_run_is_gathered_again(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite(MLP)
    gather(tmp_path, path)
    file = GatherFolder(tmp_path / "out" / "trajectories").run(ids_of(path)[0])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content[:-100])
    assert gather(tmp_path, path) == 0
    assert trained == ids_of(path) * 2
    assert "will be gathered again" in capsys.readouterr().out


def test_a_run_that_cannot_be_read_is_kept(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite(MLP)
    gather(tmp_path, path)

    def failing(*_arguments: Any, **_options: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("data.trajectories.guard.h5py.File", failing)
        with pytest.raises(FileFault, match="Input/output error"):
            gather(tmp_path, path)
    assert gather(tmp_path, path) == 0
    assert trained == ids_of(path)


def test_a_run_that_diverges_is_recorded_as_such(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite(MLP + "lr = [0.05, 1e30]\nwarmup = 0.0")
    assert gather(tmp_path, path) == 0
    with open_trajectories(tmp_path / "out" / "trajectories.h5") as file:
        trajectory = file.read(ids_of(path)[1])
    assert trajectory.outcome["status"] == "diverged"
    assert trajectory.outcome["final_accuracy"] is None
    assert np.isnan(trajectory.similarity_TL).all()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp-digits"))
    assert row.split()[:4] == ["mlp-digits", "digits", "2", "1"]


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path,
    suite: Callable[..., str],
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = suite(MLP + "seed = [0, 1]\nbatch_size = [32, 48]")

    def failing(workload: Workload, **settings: Any) -> Training:
        if workload.recipe.batch_size == 48:
            raise UsageError("it broke")
        return train(workload, **settings)

    monkeypatch.setattr("collect.gather.trajectories.train", failing)
    assert gather(tmp_path, path) == 1
    printed = capsys.readouterr().out
    failed = [run for run in read_suite(path).runs if run.workload.recipe.batch_size == 48]
    for run in failed:
        (line,) = (line for line in printed.splitlines() if line.startswith(f"FAILED {run.title}: it broke"))
        assert line.endswith(f"({tmp_path / 'out' / 'trajectories' / 'logs' / run.id}.log)")
    assert "2 runs failed: the same command tries them again" in printed
    assert packed_ids(tmp_path) == sorted(set(ids_of(path)) - {run.id for run in failed})


def test_a_checkpoint_that_cannot_be_used_means_starting_over(
    tmp_path: Path, suite: Callable[..., str], trained: list[str]
) -> None:
    path = suite(MLP)
    files = GatherFolder(tmp_path / "out" / "trajectories")
    checkpoint = files.checkpoint(ids_of(path)[0])
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"SmartFRZ checkpoint 1\nrubbish")
    assert gather(tmp_path, path) == 0
    assert not checkpoint.exists()
    assert packed_ids(tmp_path) == ids_of(path)


def test_a_full_disk_in_the_middle_of_a_run_keeps_its_checkpoint(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite(MLP)
    with contextlib.suppress(KeyboardInterrupt):
        record_run_until(3, path, tmp_path / "out" / "trajectories")
    checkpoint = GatherFolder(tmp_path / "out" / "trajectories").checkpoint(ids_of(path)[0])
    before = checkpoint.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("predictor.shared.files._sync", full)
        with pytest.raises(FileFault, match="the disk is full"):
            record_run_until(6, path, tmp_path / "out" / "trajectories")
    assert checkpoint.read_bytes() == before


def record_run_until(step: int, suite: str, folder: Path) -> None:
    """Break the suite's first run off after a step's checkpoint."""
    (run, *_) = read_suite(suite).runs
    GatherFolder(folder).log(run.id).parent.mkdir(parents=True, exist_ok=True)
    payload = {"id": run.id, "config": run.as_dict(), "device": "cpu", "checkpoint_seconds": 0.0}

    def interrupt(share: float) -> None:
        if share * 6 > step:
            raise KeyboardInterrupt

    record_run(payload, folder, interrupt)


def test_shards_share_a_folder_and_the_last_one_packs(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite(MLP + "seed = [0, 1, 2]")
    assert gather(tmp_path, path, "--shard", "1/2") == 0
    assert trained == ids_of(path)[::2]
    assert "runs of other shards are missing" in capsys.readouterr().out
    assert not (tmp_path / "out" / "trajectories.h5").exists()
    assert gather(tmp_path, path, "--shard", "2/2") == 0
    assert packed_ids(tmp_path) == sorted(ids_of(path))


def test_a_dry_run_does_nothing_and_says_what_there_is(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gather(tmp_path, suite(MLP, "first"))
    path = suite(MLP + "seed = [0, 1]")
    capsys.readouterr()
    trained.clear()
    assert gather(tmp_path, path, "--dry-run", "--slots", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [[ids_of(path)[0], "finished"], [ids_of(path)[1], "to"]]
    assert lines[-1] == "mine: 2 runs, 1 to do, 3 at a time"
    assert not trained


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('source = "nope"', "mlp-digits source=nope seed=0 .*: there is no source 'nope'"),
        (
            'source = "glosses"',
            "mlp-digits source=glosses seed=0 .* takes images: choose another one",
        ),
        ("batch_size = 100000", "mlp-digits seed=0 .*: batch_size=100000, .* digits has 96: lower them"),
    ],
)
def test_a_run_that_cannot_be_trained_is_refused_by_a_dry_run_too(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], text: str, message: str, flags: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=message):
        gather(tmp_path, suite(MLP + text), *flags)
    assert not trained


def test_what_cannot_work_is_said_before_anything_is_trained(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite(MLP)
    for flags, message in ((("--slots", "0"), "slots=0"), (("--device", "tpu"), "device='tpu': choose auto")):
        with pytest.raises(UsageError, match=message):
            gather(tmp_path, path, *flags)
    with pytest.raises(UsageError, match="did you mean 'trajectories'"):
        gather(tmp_path, "trajectorys")
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"cifar10 .* is not on this machine; to get it: "):
        gather(tmp_path, suite('[[runs]]\nworkload = "vgg11-cifar10"', "cifar"))
    (tmp_path / "way").write_text("a file is in the way")
    with pytest.raises(FileFault, match=r"cannot be written .* choose another place with --out"):
        gather(tmp_path / "way", path)
    assert not trained


@pytest.mark.parametrize("text", ["0/2", "3/2", "a/b"])
def test_a_shard_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gather(tmp_path, "trajectories", f"--shard={text}")
    assert "give i/n with i from 1 to n" in capsys.readouterr().err


def test_two_gathers_never_write_the_same_run(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path = suite(MLP)
    files, run_id = GatherFolder(tmp_path / "out" / "trajectories"), ids_of(path)[0]
    files.log(run_id).parent.mkdir(parents=True)
    monkeypatch.setattr("collect.gather.gathering._LOCK_SECONDS", 0.2)
    with files.log(run_id).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        start = time.monotonic()
        assert gather(tmp_path, path) == 1
        assert time.monotonic() - start >= 0.2
    assert gather(tmp_path, path) == 0

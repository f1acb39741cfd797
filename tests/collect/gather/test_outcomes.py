"""The command `gather outcomes`: what it does, skips and says, and that its runs are those of the trajectories."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from collect import __main__ as program
from collect.gather import continuations
from collect.gather.plan import read_suite
from data.dataset.cka_agreement import join
from data.outcomes.records import OutcomeFolder, read_outcomes
from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from predictor.errors import FileFault, UsageError
from predictor.shared.files import held, read_json_lines
from tests.collect.inline import MLP, SMALL, ids_of, put_inline

HEAD = SMALL + MLP
FEW = ("--points", "0.5", "--fronts", "0.5", "--singles", "0")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are trained in this process; their ids, in order."""
    return put_inline(monkeypatch)


@pytest.fixture
def suite(tmp_path: Path) -> Callable[..., str]:
    def write(text: str = "seed = 4", name: str = "mine") -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text(HEAD + text)
        return str(path)

    return write


def gather(tmp_path: Path, suite: str, *flags: str, what: str = "outcomes") -> int | None:
    return program.main(["gather", what, "--suite", suite, "--out", str(tmp_path / "out"), *flags])


def test_outcomes_meet_the_trajectories_of_the_same_runs(
    tmp_path: Path, suite: Callable[..., str], trained: list[str]
) -> None:
    path = suite()
    assert gather(tmp_path, path, what="trajectories") == 0
    assert gather(tmp_path, path, "--points", "0,0.5", "--singles", "1") == 0
    outcomes = read_outcomes(tmp_path / "out" / "outcomes.jsonl")
    with open_trajectories(tmp_path / "out" / "trajectories.h5") as file:
        (trajectory,) = file
    for name in ("final_loss", "final_accuracy"):  # the very same training
        assert getattr(outcomes[0].result, name) == trajectory.outcome[name]
    joined = join(outcomes, tmp_path / "out" / "trajectories.h5")
    assert len(joined) == 2 * (4 + 1)
    labels_TL = LabelRule(0.9).labels(trajectory.similarity_TL)
    for labelled in joined:
        row = trajectory.step_T.tolist().index(labelled.outcome.step)
        indices = labelled.outcome.layers
        assert labelled.outcome.layer_names == tuple(trajectory.layer_names[index] for index in indices)
        assert labelled.freezable(LabelRule(0.9)) == tuple(labels_TL[row, list(indices)])


def test_what_is_there_is_not_trained_again(tmp_path: Path, suite: Callable[..., str], trained: list[str]) -> None:
    path = suite("seed = [0, 1]")
    assert gather(tmp_path, path, *FEW) == 0
    assert trained == ids_of(path)
    packed = tmp_path / "out" / "outcomes.jsonl"
    content = packed.read_bytes()
    trained.clear()
    left = OutcomeFolder(tmp_path / "out" / "outcomes").state(ids_of(path)[0], 3)
    left.parent.mkdir(parents=True)
    left.touch()  # by a kill at the very end
    assert gather(tmp_path, path, *FEW) == 0
    assert not trained
    assert packed.read_bytes() == content
    assert not left.parent.exists()
    assert gather(tmp_path, path, *FEW[:-1], "1") == 0
    assert trained == ids_of(path)
    assert len(packed.read_text().splitlines()) == 2 * (3 + 1)
    rows = read_json_lines(tmp_path / "out" / "outcomes" / "metrics.jsonl")
    assert [row["run"] for row in rows if "run" in row] == ids_of(path) * 2


def test_what_was_begun_with_other_choices_outlives_a_gather_that_has_all(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite()
    gather(tmp_path, path, *FEW)
    (run_id,), files = ids_of(path), OutcomeFolder(tmp_path / "out" / "outcomes")
    others, append, lines = ("--points", "0,0.5", *FEW[2:]), continuations.append_json_line, iter(range(1))

    def broken_off(file: Path, content: object) -> None:
        if next(lines, None) is None:
            raise FileFault("the disk is full")
        append(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(continuations, "append_json_line", broken_off)
        assert gather(tmp_path, path, *others) == 1
    begun = files.so_far(run_id).read_text()
    assert len(begun.splitlines()) == 1
    assert gather(tmp_path, path, *FEW) == 0
    assert files.so_far(run_id).read_text() == begun
    assert gather(tmp_path, path, *others) == 0
    assert not files.under_way(run_id).exists()


def test_what_another_gather_is_at_is_not_removed(
    tmp_path: Path, suite: Callable[..., str], trained: list[str]
) -> None:
    path = suite()
    gather(tmp_path, path, *FEW)
    (run_id,), files = ids_of(path), OutcomeFolder(tmp_path / "out" / "outcomes")
    files.under_way(run_id).mkdir(parents=True)
    with held(files.log(run_id), "a test"):
        assert gather(tmp_path, path, *FEW) == 0
    assert files.under_way(run_id).exists()


def test_a_damaged_file_is_gathered_again(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite()
    gather(tmp_path, path, *FEW)
    content = (tmp_path / "out" / "outcomes.jsonl").read_bytes()
    file = OutcomeFolder(tmp_path / "out" / "outcomes").run(ids_of(path)[0])
    file.write_bytes(file.read_bytes()[:-40])
    assert gather(tmp_path, path, *FEW) == 0
    assert "line 3: cut short, or not JSON" in capsys.readouterr().out
    assert trained == ids_of(path) * 2
    assert (tmp_path / "out" / "outcomes.jsonl").read_bytes() == content


def test_outcomes_that_cannot_be_read_or_are_of_a_newer_version_are_kept(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = suite()
    gather(tmp_path, path, *FEW)
    file = OutcomeFolder(tmp_path / "out" / "outcomes").run(ids_of(path)[0])

    sound, read = file.read_text(), Path.open

    def denied(path: Path, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:
        if path == file and mode == "rb":
            raise PermissionError(13, "Permission denied")
        return read(path, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(FileFault, match="Permission denied"):
            gather(tmp_path, path, *FEW)
    assert file.read_text() == sound
    newer = sound.replace('"kind": "front"', '"kind": "back"')
    file.write_text(newer)
    with pytest.raises(FileFault, match=r"line 2: .*'back'.*: update the toolkit, or remove the file"):
        gather(tmp_path, path, *FEW)
    assert file.read_text() == newer


def test_a_dry_run_does_nothing_and_says_what_there_is(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gather(tmp_path, suite("seed = 0", "first"), *FEW)
    path = suite("seed = [0, 1]")
    trained.clear()
    capsys.readouterr()
    assert gather(tmp_path, path, *FEW, "--dry-run", "--slots", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [[ids_of(path)[0], "finished"], [ids_of(path)[1], "to"]]
    assert lines[-1] == "mine: 2 runs, 1 to do, 3 at a time; each goes on from 1 points, up to 2 times from each"
    gather(tmp_path, path, "--dry-run")
    assert capsys.readouterr().out.splitlines()[0].split()[1] == "begun"
    assert not trained


def test_the_default_suite_is_made_of_runs_of_the_default_trajectories() -> None:
    ours, theirs = read_suite("outcomes"), read_suite("trajectories")
    assert {run.id for run in ours.runs} < {run.id for run in theirs.runs}


def test_what_cannot_work_is_said_before_anything_is_trained(
    tmp_path: Path, suite: Callable[..., str], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite()
    for flags, message in ((("--points", "0,1"), "points=0,1"), (("--slots", "0"), "slots=0")):
        with pytest.raises(UsageError, match=message):
            gather(tmp_path, path, *flags)
    with pytest.raises(SystemExit, match="2"):
        gather(tmp_path, path, "--fronts", "half")
    assert "half: give numbers with commas between them" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gather(tmp_path, path, "--points", "0.5", what="trajectories")
    (tmp_path / "way").write_text("a file is in the way")
    with pytest.raises(FileFault, match=r"cannot be written .* choose another place with --out"):
        gather(tmp_path / "way", path)
    assert not trained

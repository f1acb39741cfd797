"""A search whose folds are jobs: the study of one process, and of several at once."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from collect.jobs import JobOptions
from collect.search.fold_jobs import FoldJobs, score_fold
from collect.search.task_source import TaskSource
from predictor.__main__ import main
from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.training.config import FitConfig, TuneConfig
from predictor.training.search_task import Choice
from predictor.training.splits import HeldOut
from predictor.training.trials_elsewhere import Fold
from tests.collect.inline import InlineEngine
from tests.predictor.conftest import write_trajectories  # noqa: F401
from tests.processes import wait_for

CHECKOUT = Path(__file__).parents[3]
QUICK = ["--epochs", "1", "--epoch-windows", "256", "--device", "cpu", "--folds", "3", "--held-out", "none"]


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Plots take longer than all else."""
    monkeypatch.setattr("predictor.training.plots.study", lambda *_: [])


@pytest.fixture
def source(write_trajectories):  # noqa: F811
    settings = FitConfig(epochs=1, epoch_windows=256, device="cpu")
    return TaskSource((str(write_trajectories()),), (), 0.98, 0.0, 0.5, HeldOut(), TuneConfig(folds=3), settings)


def tune(data, out, *flags):
    main(["tune", "--data", *data, "--out", str(out), *QUICK, *flags])


def trials(folder):
    """What became of each trial, its score and its settings, read past Optuna."""
    question = "SELECT {} FROM trials LEFT JOIN {} USING (trial_id) ORDER BY number, 2, 3"
    with sqlite3.connect(folder / "study.db", timeout=30) as connection:
        scores = connection.execute(question.format("number, state, value", "trial_values")).fetchall()
        return scores, connection.execute(question.format("number, param_name, param_value", "trial_params")).fetchall()


def test_one_at_a_time_in_another_process_is_the_study_of_this_one(source, tmp_path, monkeypatch):
    """Pruned trials included, to the last bit."""
    tune(source.data, tmp_path / "here", "--trials", "8")
    monkeypatch.setattr(JobOptions, "one_machine", property(lambda self: False))  # as for a cluster
    engine = InlineEngine()
    monkeypatch.setattr(JobOptions, "make_engine", lambda *_: engine)
    tune(source.data, tmp_path / "there", "--trials", "8", "--slots", "1")
    assert len(engine.ids) > 8
    assert trials(tmp_path / "there") == trials(tmp_path / "here")
    assert {state for _, state, _ in trials(tmp_path / "here")[0]} == {"COMPLETE", "PRUNED"}


def test_several_at_once_make_as_many_trials_as_asked_for_and_go_on(source, tmp_path, capsys):
    tune(source.data, tmp_path, "--trials", "3", "--slots", "2")
    scores, _ = trials(tmp_path)
    assert [number for number, *_ in scores] == [0, 1, 2]
    tune(source.data, tmp_path, "--trials", "5", "--slots", "2")
    assert trials(tmp_path)[0][:3] == scores
    assert [number for number, *_ in trials(tmp_path)[0]] == [0, 1, 2, 3, 4]
    assert len({value for _, name, value in trials(tmp_path)[1] if name == "learning_rate"}) == 5
    assert "best of 5 trials" in capsys.readouterr().out
    assert len(list((tmp_path / "logs").glob("trial-0-fold-*.log"))) == 3


def test_a_process_that_dies_ends_the_search_and_the_same_command_goes_on(source, tmp_path):
    """The trials that ran count as failed, and leave no process behind."""
    arguments = ["tune", "--data", *source.data, "--out", str(tmp_path), *QUICK, "--trials", "4", "--slots", "2"]
    command = [sys.executable, "-m", "predictor", *arguments, "--trials", "400"]
    with (tmp_path / "printed").open("wb") as printed:
        driver = subprocess.Popen(command, cwd=CHECKOUT, stdout=printed, stderr=printed)
    wait_for(lambda: any((tmp_path / "logs").glob("*.log")) and workers(driver.pid), driver, 120)
    os.kill(min(workers(driver.pid)), signal.SIGKILL)
    assert driver.wait(120) == 2
    assert "was killed (signal 9)" in (tmp_path / "printed").read_text()
    assert "RUNNING" not in {state for _, state, _ in trials(tmp_path)[0]}
    main(arguments)
    assert sum(state in ("COMPLETE", "PRUNED") for _, state, _ in trials(tmp_path)[0]) == 4


def workers(parent):
    """The processes that do jobs, which threads of the parent have started."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children"))
    return [int(pid) for pid in children.split() if "collect.jobs.worker" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_job_refuses_other_data_and_passes_on_what_no_settings_can(source, tmp_path):
    task = source.read()
    jobs = FoldJobs(source, task.fingerprint, tmp_path, 1, JobOptions())
    seen = []

    class Engine:
        def run(self, jobs, folder, log, report):
            seen.extend(jobs)

    choice = Choice(PredictorConfig(window=6, weights=32, hidden=16, key=8), source.settings, 0.98)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobOptions, "make_engine", lambda *_: Engine())
        jobs.score([Fold(0, 1, choice)], lambda *_: None)
    payload = seen[0].payload
    assert score_fold(payload, tmp_path, None)["scores"] == task.scores(choice, 1)
    with pytest.raises(UsageError, match="the data have changed"):
        score_fold({**payload, "fingerprint": "another"}, tmp_path, None)
    assert list(seen[0].inputs.values()) == list(source.data)


def test_files_are_found_where_they_were_sent(source, tmp_path):
    named = replace(source, data=("/no/such/runs.h5", "/no/such/folder"), outcomes=("/no/such/outcomes.jsonl",))
    assert named.found_in(tmp_path) == named
    for name in named.files:
        (tmp_path / name).touch()
    found = named.found_in(tmp_path)
    assert all(Path(path).parent == tmp_path for path in (*found.data, *found.outcomes))
    assert len({*found.data, *found.outcomes}) == 3
    assert TaskSource.from_dict(source.as_dict()) == source


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots", "2", "--storage", "some.journal"], "give one of them"),
        (["--engine", "ray", "--storage", "some.journal"], "give one of them"),
        (["--slots", "-1"], "slots=-1"),
        (["--address", "h:1"], "add --engine ray"),
    ],
)
def test_what_cannot_work_is_a_clear_error(source, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        tune(source.data, tmp_path / "out", *flags)
    assert not (tmp_path / "some.journal").exists()

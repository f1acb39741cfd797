"""Searching for settings: a study that goes on where it was killed, and never looks at the test runs."""

import fcntl
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from predictor.__main__ import _parser, main
from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.shared import flags as cli
from predictor.shared.files import read_json_lines, write_json
from predictor.shared.tracking import start_tracker
from predictor.training import plots
from predictor.training.config import FitConfig, TuneConfig
from predictor.training.dataset import WindowSet
from predictor.training.search_task import Choice, SearchTask, suggest
from predictor.training.splits import split_by_run
from predictor.training.tune import tune
from predictor.training.tuned_settings import settings_flags

CHECKOUT = Path(__file__).parents[3]
FIT = FitConfig(epochs=1, device="cpu", epoch_windows=256)
LABELS = {"label_threshold": 0.98}
CHOICE = Choice(PredictorConfig(window=6, weights=32, hidden=16, key=8), FIT, 0.98)


def task_of(windows, **config):
    return SearchTask(
        {0.98: windows, 0.95: windows}, 0.98, LABELS, TuneConfig(**{"trials": 2, "folds": 3, **config}), FIT
    )


def states(folder):
    """The states of the trials, read past Optuna."""
    with sqlite3.connect(folder / "study.db", timeout=30) as connection:
        return [row[0] for row in connection.execute("SELECT state FROM trials ORDER BY number")]


def test_a_study_ends_with_as_many_trials_as_asked_and_goes_on(make_windows, tmp_path):
    windows = make_windows(each=3)
    with start_tracker("tune", "off", tmp_path, {}) as tracker:
        study = tune(task_of(windows), tmp_path, tracker=tracker, progress=False)
    assert len(study.trials) == 2
    first = study.trials[0]
    assert first.params["window"] == PredictorConfig().window
    assert first.params["weights"] == 32
    assert first.params["learning_rate"] == FitConfig().learning_rate
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")[1:]] == [0, 1]

    assert len(tune(task_of(windows), tmp_path, progress=False).trials) == 2  # nothing left to do
    study = tune(task_of(windows, trials=3), tmp_path, progress=False)
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 3
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["score"] == max(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)
    assert best["trial"] == study.best_trial.number
    assert best["settings"]["label_threshold"] == 0.98
    assert set(asdict(PredictorConfig())) < set(best["settings"])
    drawn = plots.study(study, tmp_path)
    assert tmp_path / "optimization_history.png" in drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_train_has_the_split_and_the_epochs_of_the_study_unless_a_flag_says_otherwise(make_windows, tmp_path):
    windows = make_windows(each=3)
    fixed = replace(FIT, epochs=2, patience=1, epoch_windows=300, validation=0.25, test=0.3, split_seed=7)
    task = SearchTask({0.98: windows}, 0.98, LABELS, TuneConfig(trials=1, folds=3), fixed)
    tune(task, tmp_path, progress=False)
    found = given(*settings_flags(tmp_path / "best.json"))
    for name in ("epochs", "patience", "epoch_windows", "validation", "test", "split_seed"):
        assert getattr(found, name) == getattr(fixed, name)
    assert split_by_run(windows.runs, found.validation, found.test, found.split_seed) == task._split
    assert given(*settings_flags(tmp_path / "best.json"), "--split-seed", "8") == replace(found, split_seed=8)


def test_every_setting_of_a_training_can_be_handed_on_in_a_file(tmp_path):
    settings = FitConfig(3, 2, 99, 16, 0.5, 0.0, 0.1, True, "robust", 0.1, 0.3, 0.25, 4, 5, "cpu", "shipped")
    assert not any(value == getattr(FitConfig(), name) for name, value in asdict(settings).items())
    write_json(tmp_path / "best.json", {"settings": asdict(settings)})
    assert given(*settings_flags(tmp_path / "best.json")) == settings


def given(*flags):
    return cli.from_flags(FitConfig, _parser().parse_args(["train", *flags]))


def test_the_test_runs_have_no_say(make_windows):
    windows = make_windows(each=3)
    task = task_of(windows)
    spoilt = list(windows.runs)
    for run in task._split.test:
        spoilt[run] = replace(spoilt[run], labels_TL=~spoilt[run].labels_TL)
    other = task_of(WindowSet(tuple(spoilt), windows.window))
    assert [task.scores(CHOICE, fold) for fold in range(3)] == [other.scores(CHOICE, fold) for fold in range(3)]


def test_a_fold_is_scored_on_families_that_were_not_trained_on(make_windows):
    windows = make_windows(each=3)
    task = task_of(windows)
    (family,) = task.folds[0]
    # Other labels of the family left out leave the model as it was: the ranking is just the other way round.
    spoilt = (replace(run, labels_TL=~run.labels_TL) if run.family == family else run for run in windows.runs)
    other = task_of(WindowSet(tuple(spoilt), windows.window))
    assert other.scores(CHOICE, 0)[0] == pytest.approx(1 - task.scores(CHOICE, 0)[0])
    assert other.scores(CHOICE, 1) != task.scores(CHOICE, 1)


def test_windows_of_any_width_are_scored_at_the_same_snapshots(make_windows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "predictor.training.search_task.auroc", lambda labels, probability: seen.append(labels.tolist()) or 0.5
    )
    task = task_of(make_windows(each=3))
    for window in (3, 12):
        task.scores(replace(CHOICE, config=replace(CHOICE.config, window=window)), 0)
    assert seen[0] == seen[1]


def test_every_part_of_the_search_space_builds(make_windows):
    task = task_of(make_windows(each=3))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [suggest(study.ask(), task) for _ in range(30)]
    assert {choice.config.inputs for choice in found} == {"gain", "motion", "raw"}
    assert {choice.config.weights for choice in found} == {32}
    assert {choice.learn_threshold for choice in found} == {0.95, 0.98}
    assert len({choice.config.window for choice in found}) > 5
    assert len({choice.settings.scaling for choice in found}) == 3
    wide, study = task_of(make_windows(each=3, weights=100)), optuna.create_study()
    assert {suggest(study.ask(), wide).config.weights for _ in range(30)} == {32, 64, 100}


@pytest.mark.parametrize("name", ["what?a=1&b", "a#b%20c", "{a}", "t iny ü@:"])
def test_a_study_may_lie_in_any_folder(make_windows, tmp_path, name):
    for trials in (1, 2):
        study = tune(task_of(make_windows(each=3), trials=trials), tmp_path / name, progress=False)
        assert len(study.trials) == len(states(tmp_path / name)) == trials
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_study_of_other_data_is_refused(make_windows, tmp_path):
    tune(task_of(make_windows(each=3), trials=1), tmp_path, progress=False)
    with pytest.raises(UsageError, match="a study of other data or settings"):
        tune(task_of(make_windows(each=4)), tmp_path, progress=False)
    with pytest.raises(UsageError, match="a study of other data or settings"):
        tune(task_of(make_windows(each=3), score="precision_not_yet"), tmp_path, progress=False)
    first, *rest = make_windows(each=3).runs
    other = WindowSet((replace(first, labels_TL=~first.labels_TL), *rest), make_windows(each=3).window)
    with pytest.raises(UsageError, match="a study of other data or settings"):
        tune(task_of(other), tmp_path, progress=False)


def test_trials_that_cannot_work_are_passed_over_and_none_at_all_is_an_error(make_windows, tmp_path):
    windows = make_windows(each=3)
    hopeless = replace(windows, runs=tuple(replace(run, labels_TL=run.labels_TL | True) for run in windows.runs))
    with pytest.raises(UsageError, match=r"all .* windows are labelled freezable"):
        tune(task_of(hopeless), tmp_path, progress=False)


def test_a_broken_study_file_is_a_clear_error(make_windows, tmp_path):
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(FileFault, match="choose another folder"):
        tune(task_of(make_windows(each=3)), tmp_path, progress=False)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"folds": 1}, {"timeout": math.nan}, {"timeout": -1.0}])
def test_a_study_that_cannot_be_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"--{name} {value}: give a "):
        TuneConfig(**wrong)


def test_a_study_takes_every_seed_that_a_training_takes(make_windows, tmp_path):
    settings = replace(FIT, seed=2**64 - 1)
    task = SearchTask({0.98: make_windows(each=3)}, 0.98, LABELS, TuneConfig(trials=1, folds=3), settings)
    assert len(tune(task, tmp_path, progress=False).trials) == 1


def test_a_trial_that_was_killed_at_its_very_start_does_not_run_for_ever(make_windows, tmp_path):
    windows = make_windows(each=3)
    study = tune(task_of(windows, trials=1), tmp_path, progress=False)
    study.ask()  # its result will never come
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]
    tune(task_of(windows, trials=2), tmp_path, progress=False)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_the_default_settings_are_tried_even_if_the_first_trial_was_interrupted(make_windows, tmp_path, monkeypatch):
    windows = make_windows(each=3)

    def interrupted(trial, task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("predictor.training.tune._objective", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(task_of(windows, trials=1), tmp_path, progress=False)
    assert states(tmp_path) == ["FAIL"]
    study = tune(task_of(windows, trials=1), tmp_path, progress=False)
    assert states(tmp_path) == ["FAIL", "COMPLETE"]
    assert study.trials[1].params["learning_rate"] == FitConfig().learning_rate


def test_two_searches_at_once_in_one_folder_are_refused(make_windows, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another tune is at work there"):
            tune(task_of(make_windows(each=3), trials=1), tmp_path, progress=False)


def test_a_study_that_was_killed_goes_on(write_trajectories, tmp_path, monkeypatch):
    data, folder = write_trajectories(each=3), tmp_path / "tune"
    command = [sys.executable, "-m", "predictor", "tune", "--data", str(data), "--out", str(folder), "--epochs", "1"]
    # Were it not killed, this one would go on for hours.
    started = subprocess.Popen(
        [*command, "--trials", "9999", "--folds", "2"], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 300
        while not ((folder / "study.db").exists() and (found := _try_states(folder)).count("COMPLETE") >= 1):
            assert started.poll() is None, started.stdout.read().decode()
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.communicate()
    before = states(folder)
    monkeypatch.setattr("predictor.training.plots.study", lambda *_: [])

    done = before.count("COMPLETE") + before.count("PRUNED")
    main([*command[3:], "--trials", str(done + 1), "--folds", "2"])
    after = states(folder)
    assert after[: len(before)] == ["FAIL" if state == "RUNNING" else state for state in before]
    assert after.count("COMPLETE") + after.count("PRUNED") == done + 1
    assert "RUNNING" not in after
    assert (folder / "best.json").exists()


def _try_states(folder):
    try:
        return states(folder)
    except sqlite3.OperationalError:  # not set up yet
        return []


@pytest.mark.parametrize("begun", [False, True])
def test_a_study_that_another_program_holds_is_named_with_the_cure(begun, make_windows, tmp_path, monkeypatch):
    monkeypatch.setattr("predictor.training.tune._LOCK_SECONDS", 0.1)
    windows = make_windows(each=3)
    tune(task_of(windows), tmp_path, progress=False)
    other = sqlite3.connect(tmp_path / "study.db", timeout=30, isolation_level=None)
    if begun:  # the file is locked while a trial is under way
        monkeypatch.setattr(SearchTask, "scores", lambda *_: other.execute("BEGIN EXCLUSIVE"))
    else:
        other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(FileFault, match=r"study.db: another program holds .*locked.* start again"):
        tune(task_of(windows, trials=3), tmp_path, progress=False)
    other.close()
    monkeypatch.undo()
    assert len(states(tmp_path)) >= 2

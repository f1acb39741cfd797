"""Several workers in one study: just as many trials as asked for, whoever is killed, and the same best for all."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from predictor.__main__ import main
from predictor.errors import UsageError
from predictor.training import search_task, shared_search
from predictor.training.shared_search import best_trial, finished, give_up, run_trials
from predictor.training.study_storage import STORAGE_VARIABLE, SharedStudy
from tests.postgres import PASSWORD, USER
from tests.processes import wait_for

CHECKOUT = Path(__file__).parents[3]
# A worker without torch, which starts at once. The one that hangs is in its trial for ever.
WORKER = """
import json, os, sys, time
import optuna
from predictor.training import shared_search
from predictor.training.study_storage import STORAGE_VARIABLE, SharedStudy

shared_search.STALE_SECONDS, shared_search._POLL_SECONDS = 3.0, 0.1
hangs, trials = sys.argv[1] == "hangs", int(sys.argv[2])

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    time.sleep(3600 if hangs else 0.1)
    trial.report(x, 0)
    return round(x, 1)

shared = SharedStudy(os.environ[STORAGE_VARIABLE])
study = shared.open("same", {}, {"x": 0.5}, optuna.pruners.NopPruner())
shared_search.run_trials(study, objective, trials=trials, timeout=None, after=lambda trial: None)
best = shared_search.best_trial(study)
print(json.dumps([best.number, best.params, best.value, len(shared_search.finished(study))]))
"""


@pytest.fixture
def start(tmp_path):
    """Start workers, which end with the test."""
    started = []

    def start(storage, does, trials):
        environment = {
            **os.environ,
            STORAGE_VARIABLE: storage,
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path]),
        }
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, does, str(trials)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def joined(storage):
    return SharedStudy(storage).open("same", {}, {"x": 0.5}, optuna.pruners.NopPruner())


def runs_trial_of(study, worker):
    ours = f":{worker.pid}"
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(trial.user_attrs.get("worker", "").endswith(ours) and "beat" in trial.user_attrs for trial in running)


def states(study):
    return Counter(trial.state.name for trial in study.trials)


def results(workers):
    found = []
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err
        found.append(out)
    return found


def test_four_workers_of_whom_one_is_killed_end_with_just_the_trials_asked_for(postgres_server, start):
    storage = postgres_server.database()
    killed, *others = [start(storage, does, 6) for does in ("hangs", "works", "works", "works")]
    study = joined(storage)  # whoever of the five comes first makes it
    wait_for(lambda: runs_trial_of(study, killed), killed)
    killed.kill()
    found = results(others)
    assert len(set(found)) == 1
    number, params, value, count = json.loads(found[0])
    assert count == len(finished(study)) == 6
    assert (number, params, value) == (best_trial(study).number, best_trial(study).params, best_trial(study).value)
    lost = [trial for trial in study.trials if trial.user_attrs.get("worker", "").endswith(f":{killed.pid}")]
    assert [trial.state.name for trial in lost] == ["FAIL"]
    assert not {"RUNNING", "WAITING"} & set(states(study))
    assert 0.5 in {trial.params["x"] for trial in finished(study)}  # the default settings, whoever began with them


def test_two_workers_share_a_journal_file(tmp_path, start):
    storage = str(tmp_path / "study.journal")
    killed = start(storage, "hangs", 6)
    study = joined(storage)  # whoever of both comes first makes it
    wait_for(lambda: runs_trial_of(study, killed), killed)  # before the others can take all trials
    others = [start(storage, "works", 6) for _ in range(2)]
    wait_for(lambda: len(finished(study)) > 0, killed)
    killed.kill()
    assert len(set(results(others))) == 1
    assert states(study)["COMPLETE"] == 6
    assert "RUNNING" not in states(study)


def test_ctrl_c_leaves_the_trial_failed_and_its_settings_for_others(tmp_path, start):
    storage = str(tmp_path / "study.journal")
    worker, study = start(storage, "hangs", 6), joined(storage)
    wait_for(lambda: runs_trial_of(study, worker), worker)
    worker.send_signal(signal.SIGINT)
    worker.communicate(timeout=60)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
    assert study.trials[1].system_attrs["fixed_params"] == {"x": 0.5}


def test_workers_go_on_after_the_server_was_away(postgres_server, start):
    storage = postgres_server.database()
    worker, study = start(storage, "works", 6), joined(storage)
    wait_for(lambda: len(finished(study)) >= 1, worker)
    postgres_server.stop()
    postgres_server.start()
    results([worker])
    assert len(finished(study)) == 6


@pytest.fixture
def study(tmp_path):
    return joined(str(tmp_path / "study.journal"))


def run(study, trials, objective=lambda trial: trial.suggest_float("x", 0, 1)):
    seen = []
    run_trials(study, objective, trials=trials, timeout=None, after=seen.append)
    return seen


def test_trials_are_counted_over_all_starts(study):
    assert [trial.number for trial in run(study, 2)] == [0, 1]
    assert run(study, 2) == []
    assert [trial.number for trial in run(study, 3)] == [2]
    assert study.trials[0].params == {"x": 0.5}


def test_of_two_that_begin_at_the_same_moment_one_withdraws(study, monkeypatch):
    run(study, 3)
    monkeypatch.setattr(shared_search, "finished", lambda study: [])  # seen before the others ended theirs
    assert shared_search._begin(study, 3) is None
    monkeypatch.undo()
    assert states(study) == {"COMPLETE": 3, "FAIL": 1}


def test_a_trial_that_others_gave_up_does_not_count_and_the_worker_goes_on(study):
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            assert give_up(study, 0)  # as another worker does after this one slept
            trial.report(x, 0)
        return x

    assert [trial and trial.number for trial in run(study, 2, objective)] == [None, 1, 2]
    assert states(study) == {"FAIL": 1, "COMPLETE": 2}
    assert study.trials[1].params == {"x": 0.5}


def test_a_trial_is_given_up_once(study):
    number = study.ask().number
    assert [give_up(study, number) for _ in range(3)] == [True, False, False]
    assert states(study) == {"FAIL": 1, "WAITING": 1}


def test_settings_that_were_asked_for_wait_before_the_place_of_a_trial_given_up_is_free(study, monkeypatch):
    number, tell, seen = study.ask().number, study.tell, []

    def killed(*args, **kwargs):
        seen.append(states(study))
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "tell", killed)
    with pytest.raises(KeyboardInterrupt):
        give_up(study, number)
    assert seen == [{"RUNNING": 1, "WAITING": 1}]
    monkeypatch.setattr(study, "tell", tell)
    assert give_up(study, number)  # another worker, which puts nothing back a second time
    assert states(study) == {"FAIL": 1, "WAITING": 1}


def test_a_worker_that_beats_is_never_given_up_and_one_that_stops_is(study):
    alive, dead = shared_search._Heart(study), shared_search._Heart(study)
    alive.trial, dead.trial = study.ask(), study.ask()
    dead.beat()
    for _ in range(shared_search._MISSED_BEATS):
        alive.beat()
        alive.watch()
        assert study.trials[dead.trial.number].state == TrialState.RUNNING
    alive.watch()
    assert study.trials[dead.trial.number].state == TrialState.FAIL
    dead.beat()  # it awakes, which is no error
    for _ in range(shared_search._MISSED_BEATS + 2):
        alive.beat()
        dead.watch()
    assert study.trials[alive.trial.number].state == TrialState.RUNNING


def test_a_worker_that_was_killed_before_its_first_beat_is_missed_too(study):
    study.ask()
    heart = shared_search._Heart(study)
    for _ in range(shared_search._MISSED_BEATS + 1):
        heart.watch()
    assert states(study) == {"FAIL": 1, "WAITING": 1}


def test_an_error_in_a_trial_ends_the_worker_and_fails_the_trial(study):
    def objective(trial):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(study, 2, objective)
    assert states(study) == {"FAIL": 1, "WAITING": 1}


def test_the_timeout_ends_the_waiting_for_others(study):
    study.ask()
    run_trials(study, lambda trial: 1.0, trials=1, timeout=0.1, after=lambda trial: None)
    assert states(study) == {"RUNNING": 1}


def secrets_in(folder):
    words = (PASSWORD.encode(), USER.encode(), b"?host=")
    return [path for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in words)]


def test_the_command_on_a_server_writes_no_secret_and_the_same_for_every_worker(
    write_trajectories, postgres_server, tmp_path, monkeypatch, capfd, caplog
):
    data, storage = write_trajectories(each=3), postgres_server.database()
    monkeypatch.setenv(STORAGE_VARIABLE, storage)
    flags = ["tune", "--data", str(data), "--epochs", "1", "--epoch-windows", "64", "--folds", "2", "--trials", "3"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:  # the second finds nothing left to do
        main([*flags, "--out", str(out)])
    first, second = ((out / "best.json").read_bytes() for out in outs)
    assert first == second
    assert json.loads(first)["trials"] == 3
    assert not (outs[0] / "study.db").exists()
    for name in ("optimization_history.png", "slice.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert secrets_in(tmp_path) == []
    printed = "".join(capfd.readouterr()) + caplog.text
    assert "postgresql:///study" in printed
    assert not any(secret in printed for secret in (PASSWORD, USER, "?host="))

    with pytest.raises(UsageError, match="--study"):
        main([*flags, "--seed", "1", "--out", str(tmp_path / "three")])


def test_a_password_that_was_typed_is_kept_from_wandb_and_from_the_errors_of_the_flags(
    postgres_server, monkeypatch, tmp_path, capsys
):
    storage = postgres_server.database()
    command = ["predictor", "tune", f"--storage={storage}", "--data", str(tmp_path / "none.h5")]
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(UsageError, match=r"none\.h5"):
        main()
    assert not any(PASSWORD in argument or USER in argument for argument in sys.argv)
    with pytest.raises(SystemExit):
        main(["tune", f"--sotrage={storage}"])
    printed = "".join(capsys.readouterr())
    assert "list" in printed
    assert not any(secret in printed for secret in (PASSWORD, USER))


def test_a_server_that_is_not_there_is_found_before_the_data_are_read(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(UsageError, match="cannot be reached"):
        main(["tune", "--storage", "postgresql://bob@127.0.0.1:1/db", "--data", str(tmp_path / "none.h5")])


def test_a_name_for_a_study_that_is_not_shared_is_refused(monkeypatch):
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    with pytest.raises(UsageError, match="--storage"):
        main(["tune", "--study", "mine"])


def test_another_search_space_is_another_study(make_windows, monkeypatch):
    def identity():
        from predictor.training.config import FitConfig, TuneConfig

        windows = make_windows(each=3)
        labels = {"label_threshold": 0.98}
        task = search_task.SearchTask({0.98: windows}, 0.98, labels, TuneConfig(folds=3), FitConfig(device="cpu"))
        return search_task.search_identity(task)

    before = identity()
    assert before == identity()
    monkeypatch.setattr(search_task, "_WEIGHTS", (16, 32))
    assert before != identity()

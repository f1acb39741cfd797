"""Searching for better settings with Optuna, on families left out of training, in a study that survives being killed.

A study lies in an SQLite file, or where several machines reach it (`study_storage`). Its best settings are written as
JSON, and `train --settings` reads them.
"""

import functools
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from predictor.errors import DivergedError, FileFault, UsageError
from predictor.shared.files import held
from predictor.shared.tracking import Tracker
from predictor.training.search_task import SearchTask, default_settings, search_identity, suggest
from predictor.training.shared_search import best_trial, finished, run_trials, running_text
from predictor.training.study_storage import SharedStudy, database_error, say
from predictor.training.trials_elsewhere import Elsewhere, Steps, run_trials_elsewhere
from predictor.training.tuned_settings import BEST_FILE, write_best

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
_NAME = "smartfrz"
_LOCK_SECONDS = 60
"""How long to wait for another program that holds the study's file."""


def tune(
    task: SearchTask,
    folder: Path,
    *,
    tracker: Tracker | None = None,
    progress: bool = True,
    shared: SharedStudy | None = None,
    elsewhere: Elsewhere | None = None,
) -> "optuna.Study":
    """Run trials until the study has as many as asked for, and write the best settings to `folder`.

    A start that was killed loses the trial that it was in, and the next start goes on.

    Args:
        task: what trials are scored on.
        folder: where the best settings go, and the study, unless it is shared.
        tracker: logs the trials that ran here.
        progress: whether to show a bar.
        shared: a study that other machines work at too. The number of trials is that of all together.
        elsewhere: what scores folds in other processes. Not for a shared study, each of whose workers has one trial.

    Raises:
        UsageError: while another process uses the same folder, and for a shared study that cannot be used.
        FileFault: for a folder that cannot be used, also where it is found out later.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with held(folder / ".lock", "another tune"):
        try:
            if shared is not None:
                return _search_together(shared, task, folder, tracker, progress)
            study = _open(task, folder, at_once=1 if elsewhere is None else elsewhere.at_once)
            return _search(study, task, folder, tracker, progress, elsewhere)
        except Exception as error:
            if shared is not None:
                # Without the driver's error, whose text may hold secrets.
                raise shared.fault(error) or error from None
            fault = database_error(error)
            if fault is None:
                raise
            raise FileFault(_why_unusable(folder / STUDY_FILE, fault)) from error


def _search(
    study: "optuna.Study",
    task: SearchTask,
    folder: Path,
    tracker: Tracker | None,
    progress: bool,
    elsewhere: Elsewhere | None,
) -> "optuna.Study":
    from tqdm import tqdm

    done, trials, timeout = len(finished(study)), task.config.trials, task.config.timeout
    with tqdm(total=trials, initial=done, desc="tuning", unit="trial", disable=not progress) as bar:

        def note(trial: "optuna.trial.FrozenTrial") -> None:
            _note(trial, tracker)
            bar.update()
            bar.set_postfix_str(f"best {_best_score(study)}")

        def after(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
            note(trial)
            if len(finished(study)) >= trials:
                study.stop()

        if elsewhere is not None:
            steps = functools.partial(_steps, task=task)
            run_trials_elsewhere(study, steps, elsewhere, trials=trials, timeout=timeout, after=note)
        elif done < trials:
            study.optimize(lambda trial: _objective(trial, task), timeout=timeout, callbacks=[after])
    write_best(study, folder / BEST_FILE, task, len(study.trials))
    return study


def _search_together(
    shared: SharedStudy, task: SearchTask, folder: Path, tracker: Tracker | None, progress: bool
) -> "optuna.Study":
    from tqdm import tqdm

    study = shared.open(search_identity(task), task.described, default_settings(task), _pruner())
    trials = task.config.trials
    say(
        f"{shared.shown}, study {study.study_name}: {len(finished(study))} of {trials} trials have ended; running: "
        f"{running_text(study)}"
    )
    with tqdm(total=trials, desc="tuning", unit="trial", disable=not progress) as bar:

        def after(trial: "optuna.trial.FrozenTrial | None") -> None:
            if trial is not None:
                _note(trial, tracker)
            bar.n = min(len(finished(study)), trials)
            bar.set_postfix_str(f"best {_best_score(study)}, running: {running_text(study)}")

        after(None)
        timeout = task.config.timeout
        run_trials(study, lambda trial: _objective(trial, task), trials=trials, timeout=timeout, after=after)
    # All workers write the same. Failed trials may still be added by one that comes too late.
    write_best(study, folder / BEST_FILE, task, len(finished(study)))
    return study


def _objective(trial: "optuna.Trial", task: SearchTask) -> float:
    """Run a trial here."""
    steps = _steps(trial, task)
    try:
        step = next(steps)
        while True:
            try:
                scores = task.scores(*step)
            except (DivergedError, UsageError) as error:
                step = steps.throw(error)
            else:
                step = steps.send(scores)
    except StopIteration as ended:
        return float(ended.value)


def _steps(trial: "optuna.Trial", task: SearchTask) -> Steps:
    """A trial: which settings are to be scored on which fold, and what comes of the scores."""
    import optuna

    choice = suggest(trial, task)
    scores: list[float] = []
    for fold in range(len(task.folds)):
        try:
            scores += yield choice, fold
        except (DivergedError, UsageError) as error:
            trial.set_user_attr("fault", str(error))
            raise optuna.TrialPruned(str(error)) from error
        if scores:
            trial.report(float(np.mean(scores)), fold)
        if task.config.prune and trial.should_prune():
            raise optuna.TrialPruned
    if not scores:
        trial.set_user_attr("fault", "no family holds windows of both classes")
        raise optuna.TrialPruned
    return float(np.mean(scores))


def _open(task: SearchTask, folder: Path, at_once: int) -> "optuna.Study":
    """The study in `folder`, new or from an earlier start. Its first trial has the default settings of `train`.

    at_once: how many trials will run at the same time.
    """
    import optuna
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import QueuePool

    path = folder / STUDY_FILE
    # Not in the URL, which Optuna takes as text: `?`, `%` and braces would mean something else there.
    connect = functools.partial(sqlite3.connect, path, timeout=_LOCK_SECONDS, check_same_thread=False)
    try:
        study = optuna.create_study(
            study_name=_NAME,
            storage=RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool}),
            pruner=_pruner(),
            direction="maximize",
            load_if_exists=True,
        )
    except (SQLAlchemyError, RuntimeError) as error:
        raise FileFault(_why_unusable(path, error)) from error
    if study.user_attrs.get("fingerprint", task.fingerprint) != task.fingerprint:
        raise UsageError(
            f"{path}: a study of other data or settings ({study.user_attrs.get('described')}): choose another folder "
            "with --out, or delete it"
        )
    if not study.trials:
        study.set_user_attr("fingerprint", task.fingerprint)
        study.set_user_attr("described", task.described)
    # With the same seed a study that goes on would draw the settings of its first trials again.
    # With a constant liar trials that run at the same time do not try the same.
    seed = (task.settings.seed + len(study.trials)) % 2**32  # NumPy's generator takes no larger one
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=at_once > 1)
    _fail_stale(study)
    if not _begun(study):
        study.enqueue_trial(default_settings(task))
    return study


def _pruner() -> "optuna.pruners.BasePruner":
    import optuna

    return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)


def _why_unusable(path: Path, error: BaseException) -> str:
    """What is wrong with a study's file, and what to do."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if "locked" in reason:
        return (
            f"{path}: another program holds the study for longer than {_LOCK_SECONDS} seconds ({reason}): close it (a "
            "database browser, a dashboard, a copy), or choose a folder on a local disk with --out; then start again, "
            "and the trials that have ended are kept"
        )
    return f"{path}: no study can be kept there ({reason}): choose another folder with --out"


def _begun(study: "optuna.Study") -> bool:
    """Whether a trial has ended or waits. It has not after a kill in the very first trial, which had the defaults."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
    return bool(study.get_trials(deepcopy=False, states=states))


def _fail_stale(study: "optuna.Study") -> None:
    """Mark the trials of killed starts as failed. Otherwise they would count as running forever.

    No other process uses the study, so every running trial is one. Optuna's heartbeat would miss a trial that was
    killed before its first beat.
    """
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _best_score(study: "optuna.Study") -> str:
    try:
        return f"{best_trial(study).value:.3f}"
    except ValueError:  # none is complete
        return "n/a"


def _note(trial: "optuna.trial.FrozenTrial", tracker: Tracker | None) -> None:
    if tracker is not None:
        seconds = trial.duration.total_seconds() if trial.duration else None
        tracker.log({"score": trial.value, "state": trial.state.name, "seconds": seconds, **trial.params}, trial.number)

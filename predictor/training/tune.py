"""Searching for better settings with Optuna, in a study that survives being killed."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor.errors import DivergedError, FileFault, UsageError
from predictor.model.network import PredictorConfig
from predictor.shared.files import held, write_json
from predictor.shared.tracking import Tracker
from predictor.training.objective import HANDED_ON, SEARCHED, Choice, Task

if TYPE_CHECKING:
    import optuna

STUDY_FILE, BEST_FILE = "study.db", "best.json"
_NAME = "smartfrz"
_WEIGHTS = (32, 64, 128, 256, 512, 1024)


def tune(
    task: Task,
    folder: Path,
    *,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> "optuna.Study":
    """Run trials until the study in `folder` has as many as asked for; write the best settings beside it.

    The study lies in an SQLite file: a start that was killed loses the trial that it was in, and the next goes on.
    Raises UsageError while another process is at the same study, FileFault for a folder that cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with held(folder / ".lock", "another tune"):
        return _search(_open(task, folder), task, folder, tracker, progress)


def _search(study: "optuna.Study", task: Task, folder: Path, tracker: Tracker | None, progress: bool) -> "optuna.Study":
    from tqdm import tqdm

    done = _finished(study)
    with tqdm(total=task.config.trials, initial=done, desc="tuning", unit="trial", disable=not progress) as bar:

        def after(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
            _note(trial, tracker)
            bar.update()
            bar.set_postfix_str(f"best {_best_score(study)}")
            if _finished(study) >= task.config.trials:
                study.stop()

        if done < task.config.trials:
            study.optimize(lambda trial: _objective(trial, task), timeout=task.config.timeout, callbacks=[after])
    _write_best(study, folder / BEST_FILE, task)
    return study


def suggest(trial: "optuna.trial.BaseTrial", task: Task) -> Choice:
    """One trial's settings out of the search space.

    weights: some of those recorded, which are a random sample of a layer that holds as many; of a layer that is smaller
        they are its weights again and again, as the run time gives them too.
    """
    config: dict[str, Any] = {
        "inputs": trial.suggest_categorical("inputs", ["gain", "motion", "raw"]),
        "window": trial.suggest_int("window", 3, task.widest),
        "weights": trial.suggest_categorical("weights", _weights(task)),
        "hidden": trial.suggest_categorical("hidden", [16, 32, 64, 128]),
        "key": trial.suggest_categorical("key", [8, 16, 32, 64]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.4),
    }
    settings: dict[str, Any] = {
        "hide_clock": trial.suggest_float("hide_clock", 0.0, 0.7),
        "scaling": trial.suggest_categorical("scaling", ["standard", "robust", "none"]),
        "balance": trial.suggest_categorical("balance", [False, True]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 2e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 10.0, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256]),
    }
    several = len(task.windows) > 1
    learn_threshold = trial.suggest_categorical("learn_threshold", sorted(task.windows)) if several else task.own
    return Choice(PredictorConfig(**config), replace(task.settings, **settings), float(learn_threshold))


def _objective(trial: "optuna.Trial", task: Task) -> float:
    import optuna

    choice = suggest(trial, task)
    scores: list[float] = []
    for fold in range(len(task.folds)):
        try:
            scores += task.scores(choice, fold)
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


def _open(task: Task, folder: Path) -> "optuna.Study":
    """The study in `folder`, begun or gone on with. Its first trial has the settings that `train` has by default."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    path = folder / STUDY_FILE
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    try:
        study = optuna.create_study(
            study_name=_NAME,
            storage=f"sqlite:///{path}",
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
    except (SQLAlchemyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise FileFault(f"{path}: no study can be kept there ({reason}): choose another folder with --out") from error
    if study.user_attrs.get("fingerprint", task.fingerprint) != task.fingerprint:
        raise UsageError(
            f"{path}: a study of other data or settings ({study.user_attrs.get('described')}): choose another folder "
            "with --out, or delete it"
        )
    if not study.trials:
        study.set_user_attr("fingerprint", task.fingerprint)
        study.set_user_attr("described", task.described)
    # With the seed alone a study that goes on would draw the settings of its first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=task.settings.seed + len(study.trials))
    _fail_stale(study)
    if not _begun(study):
        study.enqueue_trial(_defaults(task))
    return study


def _begun(study: "optuna.Study") -> bool:
    """Whether a trial has come to an end or waits: not after a kill in the very first, which had the defaults."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING)
    return bool(study.get_trials(deepcopy=False, states=states))


def _fail_stale(study: "optuna.Study") -> None:
    """Mark the trials of killed starts as failed; otherwise they would count as running for ever.

    Nobody else is at the study, so every trial that runs is one. Optuna's heartbeat would miss a trial that was killed
    before its first beat.
    """
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _defaults(task: Task) -> dict[str, Any]:
    config = asdict(PredictorConfig())
    config |= {"window": min(config["window"], task.widest), "weights": min(config["weights"], task.most_weights)}
    settings = {name: value for name, value in asdict(task.settings).items() if name in SEARCHED}
    return {**config, **settings, "learn_threshold": task.own}


def _weights(task: Task) -> list[int]:
    return [count for count in _WEIGHTS if count < task.most_weights] + [task.most_weights]


def _finished(study: "optuna.Study") -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _best_score(study: "optuna.Study") -> str:
    try:
        return f"{study.best_value:.3f}"
    except ValueError:  # none is complete
        return "n/a"


def _note(trial: "optuna.trial.FrozenTrial", tracker: Tracker | None) -> None:
    if tracker is not None:
        seconds = trial.duration.total_seconds() if trial.duration else None
        tracker.log({"score": trial.value, "state": trial.state.name, "seconds": seconds, **trial.params}, trial.number)


def _write_best(study: "optuna.Study", path: Path, task: Task) -> None:
    import optuna

    try:
        best = study.best_trial
    except ValueError as error:
        faults = [trial.user_attrs["fault"] for trial in study.get_trials() if "fault" in trial.user_attrs]
        reason = f": {faults[0]}" if faults else ": give it more time"
        raise UsageError(f"no trial of the study in {path.parent} came to an end{reason}") from error
    runs = task.reference.runs
    choice = suggest(optuna.trial.FixedTrial(best.params), task)
    settings = {name: value for name, value in asdict(choice.settings).items() if name in (*SEARCHED, *HANDED_ON)}
    write_json(
        path,
        {
            "settings": {
                **asdict(choice.config),
                **settings,
                **task.labels,
                "learn_threshold": choice.learn_threshold if len(task.windows) > 1 else None,
            },
            "score": best.value,
            "score_is": f"{task.config.score}, mean over families left out",
            # `train` refuses settings that were chosen on what it holds out.
            "chosen_on": {"families": sorted({r.family for r in runs}), "sources": sorted({r.source for r in runs})},
            "trial": best.number,
            "trials": len(study.trials),
        },
    )

"""Searching for better settings with Optuna, on families left out of training, in a study that survives being killed.

A study lies in an SQLite file, or where several machines reach it (`study_storage`). Its best settings are written as
JSON, and `train --settings` reads them.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor.errors import DivergedError, FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.shared.files import held, write_json
from predictor.shared.tracking import Tracker
from predictor.training.config import (
    CKA_LABEL_FLAGS,
    HANDED_ON,
    NOTHING,
    OUTCOME_LABEL_FLAG,
    SEARCHED,
    FitConfig,
    TuneConfig,
)
from predictor.training.dataset import WindowSet
from predictor.training.fit import fit_on
from predictor.training.metrics import auroc, average_precision
from predictor.training.shared_search import best_trial, finished, run_trials, running_text
from predictor.training.splits import HeldOut, families_of, family_folds, runs_of, split_by_run
from predictor.training.study_storage import SharedStudy, database_error, is_default, say
from predictor.training.trials_elsewhere import Elsewhere, Steps, run_trials_elsewhere

if TYPE_CHECKING:
    import optuna

STUDY_FILE, BEST_FILE = "study.db", "best.json"
_NAME = "smartfrz"
_LOCK_SECONDS = 60
"""How long to wait for another program that holds the study's file."""
_WEIGHTS = (32, 64, 128, 256, 512, 1024)
_WIDEST_WINDOW = 16


@dataclass(frozen=True)
class Choice:
    """One trial's settings."""

    config: PredictorConfig
    settings: FitConfig
    learn_threshold: float
    """The key, in `Task.windows`, of the labels that it is trained on."""


class Task:
    """What trials are scored on: the training and validation runs, with families left out in turn. Never test runs.

    Args:
        windows: the same runs labelled at each CKA threshold that a predictor may be trained on. With labels from
            outcomes, at the tolerance alone.
        own: the key of those that all trials are scored on, whatever they were trained on: AUROC on labels of different
            rules cannot be compared. For the same reason the score leaves out windows whose newest snapshot comes
            before that of the widest window.
        labels: the flags of `train` that make these labels.
        config: how the study goes.
        settings: the fit settings that are not searched.
    """

    def __init__(
        self,
        windows: Mapping[float, WindowSet],
        own: float,
        labels: dict[str, float],
        config: TuneConfig,
        settings: FitConfig,
    ) -> None:
        self.windows = windows
        self.labels = labels
        self.config = config
        self.settings = settings
        self.own = own
        self.reference = windows[own]
        runs = self.reference.runs
        self._split = split_by_run(runs, settings.validation, settings.test, settings.split_seed)
        self._pool = (*self._split.train, *self._split.validation)
        self.folds = family_folds([runs[index] for index in self._pool], config.folds, settings.split_seed)
        self.widest = min(_WIDEST_WINDOW, *(len(run.labels_TL) for run in runs))
        self.most_weights = min(run.weights_TLK.shape[-1] for run in runs)
        self.described = {"runs": len(runs), "labels": self.labels, "folds": [list(fold) for fold in self.folds]}

    @property
    def fingerprint(self) -> str:
        """What two starts of one study must share: runs, labels, score, and the settings that are fixed."""
        fixed = {name: value for name, value in asdict(self.settings).items() if name not in (*SEARCHED, "device")}
        identity = {
            "runs": sorted(run.run_id for run in self.reference.runs),
            "labels": [self.labels, sorted(self.windows), _digest(self.reference)],
            "judged": [self.config.folds, self.config.score, self.widest],
            "fixed": fixed,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def scores(self, choice: Choice, fold: int) -> list[float]:
        """The score of each family of a fold, from a predictor that was trained on the families of the others."""
        runs, left_out = self.reference.runs, self.folds[fold]
        held = set(runs_of(runs, left_out))
        train = [index for index in self._split.train if index not in held]
        validation = [index for index in self._split.validation if index not in held]
        if not train or not validation:
            raise UsageError(f"without {', '.join(left_out)} no run is left to train or to validate on: gather more")
        scored = replace(self.reference, window=choice.config.window)
        learn_from = replace(self.windows[choice.learn_threshold], window=choice.config.window)
        fitted = fit_on(learn_from.subset(train), scored.subset(validation), choice.config, choice.settings)
        found = [
            self._score(fitted.probability_N, scored.subset([i for i in self._pool if runs[i].family == family]))
            for family in left_out
        ]
        return [score for score in found if score is not None]

    def _score(self, probability_N: Callable[[WindowSet], Any], windows: WindowSet) -> float | None:
        comparable_N = (windows.index[:, 1] >= self.widest - 1).numpy()
        labels_N, probabilities_N = windows.labels_N.numpy()[comparable_N], probability_N(windows)[comparable_N]
        if self.config.score == "auroc":
            return auroc(labels_N, probabilities_N)
        return average_precision(~labels_N, 1 - probabilities_N)


def _digest(windows: WindowSet) -> str:
    """Of every label, in the order of the runs' ids: outcomes that were gathered anew may give other labels."""
    digest = hashlib.sha256()
    for run in sorted(windows.runs, key=lambda run: run.run_id):
        digest.update(np.ascontiguousarray(run.labels_TL.numpy()).tobytes())
    return digest.hexdigest()[:16]


def tune(
    task: Task,
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


def describe(study: "optuna.Study", config: TuneConfig) -> str:
    """The best settings of a study, with their score and that of the default settings."""
    trials, best = study.get_trials(deepcopy=False), best_trial(study)
    default = next((trial.value for trial in trials if is_default(trial) and trial.state.name != "FAIL"), None)
    head = (
        f"best of {len(trials)} trials: {config.score} {best.value:.3f} on families left out "
        f"(the default settings: {'n/a' if default is None else f'{default:.3f}'}), with these settings:"
    )
    return "\n".join([head, *(f"  {name} {value}" for name, value in sorted(best.params.items()))])


def settings_flags(path: Path) -> list[str]:
    """The settings of a file that `tune` wrote, as flags of `train`. Raises FileFault for any other file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        own = {field.name for kind in (PredictorConfig, FitConfig) for field in fields(kind)}
        if unknown := sorted(set(settings) - own - {*CKA_LABEL_FLAGS, OUTCOME_LABEL_FLAG}):
            raise FileFault(f"{path}: no settings of a predictor: {', '.join(unknown)}")
        return [_flag(name, value) for name, value in settings.items() if value is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FileFault):
            raise
        raise FileFault(f"{path}: no settings ({error}): give a file that `python -m predictor tune` wrote") from error


def check_settings(path: Path, held_out: HeldOut) -> None:
    """Raise UsageError if the settings of a file were chosen on what is held out: it would no longer be unseen."""
    if not held_out.families and not held_out.sources:
        return
    chosen_on = json.loads(path.read_text(encoding="utf-8")).get("chosen_on")
    cure = f"tune again with the same --held-out, or train with --held-out {NOTHING}"
    try:
        seen = held_out.among(chosen_on["families"], chosen_on["sources"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: does not say what its settings were chosen on, as `tune` does: {cure}") from error
    if seen:
        raise UsageError(f"{path}: settings that were chosen on {', '.join(seen)}, which are held out: {cure}")


def _search(
    study: "optuna.Study",
    task: Task,
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
    _write_best(study, folder / BEST_FILE, task, len(study.trials))
    return study


def _search_together(
    shared: SharedStudy, task: Task, folder: Path, tracker: Tracker | None, progress: bool
) -> "optuna.Study":
    from tqdm import tqdm

    study = shared.open(_identity(task), task.described, _defaults(task), _pruner())
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
    _write_best(study, folder / BEST_FILE, task, len(finished(study)))
    return study


def _identity(task: Task) -> str:
    """What the workers of a shared study must have in common: the task and, as their code may differ, the space."""
    import optuna

    trial = optuna.trial.FixedTrial(_defaults(task))
    suggest(trial, task)
    space = {name: repr(kind) for name, kind in trial.distributions.items()}
    return hashlib.sha256(json.dumps([task.fingerprint, space], sort_keys=True).encode()).hexdigest()[:12]


def suggest(trial: "optuna.trial.BaseTrial", task: Task) -> Choice:
    """One trial's settings from the search space.

    `weights` is some of those recorded. They are a random sample of a layer that holds as many. A smaller layer's
    weights are repeated, as they are while freezing.
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


def _steps(trial: "optuna.Trial", task: Task) -> Steps:
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


def _open(task: Task, folder: Path, at_once: int) -> "optuna.Study":
    """The study in `folder`, new or from an earlier start. Its first trial has the default settings of `train`.

    at_once: how many trials will run at the same time.
    """
    import optuna
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    path = folder / STUDY_FILE
    patience = {"connect_args": {"timeout": _LOCK_SECONDS}}
    try:
        study = optuna.create_study(
            study_name=_NAME,
            storage=RDBStorage(f"sqlite:///{path}", engine_kwargs=patience),
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
    seed = task.settings.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=at_once > 1)
    _fail_stale(study)
    if not _begun(study):
        study.enqueue_trial(_defaults(task))
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


def _flag(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed}={value}"


def _defaults(task: Task) -> dict[str, Any]:
    config = asdict(PredictorConfig())
    config |= {"window": min(config["window"], task.widest), "weights": min(config["weights"], task.most_weights)}
    settings = {name: value for name, value in asdict(task.settings).items() if name in SEARCHED}
    return {**config, **settings, "learn_threshold": task.own}


def _weights(task: Task) -> list[int]:
    return [count for count in _WEIGHTS if count < task.most_weights] + [task.most_weights]


def _best_score(study: "optuna.Study") -> str:
    try:
        return f"{best_trial(study).value:.3f}"
    except ValueError:  # none is complete
        return "n/a"


def _note(trial: "optuna.trial.FrozenTrial", tracker: Tracker | None) -> None:
    if tracker is not None:
        seconds = trial.duration.total_seconds() if trial.duration else None
        tracker.log({"score": trial.value, "state": trial.state.name, "seconds": seconds, **trial.params}, trial.number)


def _write_best(study: "optuna.Study", path: Path, task: Task, trials: int) -> None:
    import optuna

    try:
        best = best_trial(study)
    except ValueError as error:
        faults = [trial.user_attrs["fault"] for trial in study.get_trials() if "fault" in trial.user_attrs]
        reason = f": {faults[0]}" if faults else ": give it more time"
        raise UsageError(f"no trial of the study in {path.parent} was completed{reason}") from error
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
            "chosen_on": {"families": families_of(runs), "sources": sorted({r.source for r in runs})},
            "trial": best.number,
            "trials": trials,
        },
    )

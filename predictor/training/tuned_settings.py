"""The settings that a search found: written as JSON, printed, checked, and read by `train --settings`."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.shared.files import write_json
from predictor.training.config import (
    CKA_LABEL_FLAGS,
    HANDED_ON,
    NOTHING,
    OUTCOME_LABEL_FLAG,
    SEARCHED,
    FitConfig,
    TuneConfig,
)
from predictor.training.search_task import SearchTask, suggest
from predictor.training.shared_search import best_trial
from predictor.training.splits import HeldOut, families_of
from predictor.training.study_storage import is_default

if TYPE_CHECKING:
    import optuna

BEST_FILE = "best.json"


def write_best(study: "optuna.Study", path: Path, task: SearchTask, trials: int) -> None:
    """Write the best settings of a study of `trials` trials. Raises UsageError where none was completed."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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


def _flag(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed}={value}"

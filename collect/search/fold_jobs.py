"""Scores the folds of a study's trials as jobs, and the job that scores one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from collect.jobs import Job, JobOptions
from collect.jobs.engine import Event
from collect.search.task_source import TaskSource
from predictor.errors import DivergedError, UsageError
from predictor.model.config import PredictorConfig
from predictor.training.config import FitConfig
from predictor.training.search_task import Choice, SearchTask
from predictor.training.trials_elsewhere import Fold, Take

_known: dict[str, SearchTask] = {}
"""The task of this process's last job, by its fingerprint. To read it for each fold would take longer than the fold."""


class FoldJobs:
    """Scores folds with an engine: see `predictor.training.trials_elsewhere.Elsewhere`.

    Args:
        source: where the task comes from.
        fingerprint: of the task, to find out that a process has another one.
        folder: where logs go.
        at_once: folds at once.
        options: where jobs execute.
    """

    def __init__(self, source: TaskSource, fingerprint: str, folder: Path, at_once: int, options: JobOptions) -> None:
        self.at_once = at_once
        self._source, self._fingerprint, self._folder, self._options = source, fingerprint, folder, options

    def score(self, first: Sequence[Fold], take: Take) -> None:
        """Score the first folds and all that `take` returns. Raises UsageError for a job that fails."""
        # One thread: a predictor is so small that more gain nothing, and another number rounds otherwise.
        threads = 1 if self._options.one_machine else None
        engine = self._options.make_engine(self.at_once, threads, self._source.settings.device, {})
        folds: dict[str, Fold] = {}

        def job_of(fold: Fold) -> Job:
            job = self._job(fold)
            folds[job.id] = fold
            return job

        def report(job: Job, event: Event) -> Job | None:
            if "failed" in event:
                raise UsageError(f"{job.title}: {event['failed']} (log: {self._log(job.id)})")
            if "note" in event:
                tqdm.write(f"{job.title}: {event['note']}")
            if "done" not in event:
                return None
            done = event["done"]
            following = take(folds.pop(job.id), UsageError(done["fault"]) if "fault" in done else done["scores"])
            return None if following is None else job_of(following)

        engine.run([job_of(fold) for fold in first], self._folder, self._log, report)

    def _log(self, job: str) -> Path:
        return self._folder / "logs" / f"{job}.log"

    def _job(self, fold: Fold) -> Job:
        choice: Choice = fold.choice
        payload = {
            "source": self._source.as_dict(),
            "fingerprint": self._fingerprint,
            "config": asdict(choice.config),
            "settings": {**asdict(choice.settings), "device": self._options.device(choice.settings.device)},
            "learn_threshold": choice.learn_threshold,
            "fold": fold.number,
        }
        name = f"trial-{fold.trial}-fold-{fold.number}"
        title = f"trial {fold.trial}, fold {fold.number}"
        return Job(name, title, f"{__name__}:score_fold", payload, inputs=self._source.files)


def score_fold(payload: dict[str, Any], folder: Path, progress: object) -> dict[str, Any]:
    """The job: the scores of a choice on a fold, or the fault for which it has none."""
    task = _task(payload, folder)
    choice = Choice(PredictorConfig(**payload["config"]), FitConfig(**payload["settings"]), payload["learn_threshold"])
    try:
        return {"scores": task.scores(choice, payload["fold"])}
    except (DivergedError, UsageError) as error:
        return {"fault": str(error)}


def _task(payload: dict[str, Any], folder: Path) -> SearchTask:
    fingerprint = payload["fingerprint"]
    if fingerprint not in _known:
        _known.clear()
        task = TaskSource.from_dict(payload["source"]).found_in(folder).read()
        if task.fingerprint != fingerprint:
            raise UsageError("the data have changed since the search began: start it again")
        _known[fingerprint] = task
    return _known[fingerprint]

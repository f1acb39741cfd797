"""The way from a suite to one packed file, for trajectories and outcomes alike: plan, jobs, file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from collect.gather.plan import RunConfig, Suite
from collect.gather.settings import Settings
from collect.jobs import Job, run_jobs
from collect.training.checkpoint import CheckpointFault
from collect.training.checks import check_trainable
from collect.workloads import load_workload
from data.outcomes.records import OutcomeFolder
from data.trajectories.folder import GatherFolder
from predictor.errors import DamagedFile, FileFault, UsageError
from predictor.shared.files import held
from predictor.shared.tracking import Tracker

T = TypeVar("T")
State = Literal["finished", "begun", "to do"]
_LOCK_SECONDS = 20.0


class Kind(ABC):
    """What is gathered of each run: trajectories or outcomes."""

    title: str
    """The beginning of the line that announces a gathering."""
    target: str
    """The job's function: see `Job.target`."""
    threads: int | None = None
    """CPU threads of each job; None divides the cores among the slots."""
    environment: Mapping[str, str] = MappingProxyType({})
    """What the processes of the jobs find in their environment besides ours."""
    packs_after_each_run = False
    """Whether the packed file is written after each run, and not at the end alone."""
    files: GatherFolder | OutcomeFolder
    """Where the files go."""

    @property
    @abstractmethod
    def next_command(self) -> str:
        """The command that reads the packed file."""

    @property
    def config(self) -> dict[str, Any]:
        """The kind's own settings, for the tracker."""
        return {}

    @property
    def remark(self) -> str:
        """What is printed about the kind's own settings."""
        return ""

    @abstractmethod
    def state(self, run: RunConfig) -> State:
        """The state of a run, in a word or two."""

    @abstractmethod
    def check(self, run: RunConfig) -> bool:
        """Read a run's file, and say whether the run is finished. Raises DamagedFile for an unsound file."""

    @abstractmethod
    def payload(self, run: RunConfig) -> dict[str, Any]:
        """The part of the job's payload that the kind adds to `id`, `config` and `device`."""

    @abstractmethod
    def files_of(self, run_id: str) -> Sequence[Path]:
        """The files and folders from which a run that was interrupted goes on."""

    @abstractmethod
    def take(self, run_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Take the result of a job that has ended, and return the figures to log."""

    @abstractmethod
    def pack(self, runs: Sequence[RunConfig]) -> str:
        """Put the files of `runs` into one, and describe it in a line."""

    def table(self, runs: Sequence[RunConfig]) -> str:
        """A summary of finished runs; empty for none."""
        return ""


@dataclass(frozen=True)
class Gathered:
    """The result of a gathering."""

    failed: dict[str, str]
    """The errors of runs that failed, each with the path of its log, by the runs' titles."""
    packed: str | None
    """The packed file in a line; None while runs of other shards are missing, and for no runs."""
    table: str
    """A summary of the finished runs of this shard, those of earlier calls too."""


def gather(suite: Suite, kind: Kind, settings: Settings, tracker: Tracker) -> Gathered:
    """Do the missing runs of a suite, or of its shard, and pack all that are there.

    The same call resumes after a kill at any time: finished runs are kept, and others go on from their checkpoints. A
    run that fails does not stop the others.

    Raises:
        UsageError: A device or source that cannot be used.
        FileFault: A folder or file that cannot be used. A finished run that cannot be read is never removed.
    """
    runs = suite.shard(*settings.shard)
    _check(runs)
    waiting = [run for run in runs if not _is_finished(kind, run)]
    done = len(runs) - len(waiting)
    shard = "" if settings.shard[1] == 1 else ", shard {}/{}".format(*settings.shard)
    before = f", {done} of them there already" if done else ""
    print(f"{kind.title} {suite.name}{shard}: {len(runs)} runs{before}, {settings.at_once}{kind.remark}", flush=True)
    failed: dict[str, str] = {}

    def on_done(job: Job, result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        tracker.log({"run": job.id, "title": job.title, **kind.take(job.id, result)}, step=done)
        if kind.packs_after_each_run:
            _pack(suite, kind, settings)

    def on_failed(job: Job, error: str) -> None:
        failed[job.title] = f"{error} ({kind.files.log(job.id)})"

    run_jobs(
        [_job(run, kind, settings) for run in waiting],
        folder=kind.files.root,
        slots=settings.chosen_slots,
        log=kind.files.log,
        on_done=on_done,
        on_failed=on_failed,
        threads=kind.threads,
        device=settings.device,
        environment=kind.environment,
        options=settings.jobs,
    )
    table = kind.table([run for run in runs if kind.files.run(run.id).is_file()])
    return Gathered(failed, _pack(suite, kind, settings), table)


def describe_plan(suite: Suite, kind: Kind, settings: Settings) -> str:
    """List what `gather` would do, one line a run. Raises as `gather` does."""
    runs = suite.shard(*settings.shard)
    _check(runs)
    states = [kind.state(run) for run in runs]
    lines = [f"{run.id}  {state:8}  {run.title}" for run, state in zip(runs, states, strict=True)]
    left = len(runs) - states.count("finished")
    end = f"{suite.name}: {len(runs)} runs, {left} to do, {settings.at_once}{kind.remark}"
    return "\n".join([*lines, end])


def attempted(log: Path, attempt: Callable[[], T], discard_checkpoints: Callable[[], None]) -> T:
    """In a job: do a run under its lock, and once again from the start if its checkpoint cannot be used.

    The lock keeps out a second gather, and a slot that outlives its killed parent for a moment.
    """
    with held(log, "another gather", _LOCK_SECONDS):
        try:
            return attempt()
        except CheckpointFault as fault:  # a full disk or a missing image is another fault, and keeps the checkpoint
            print(f"{fault}\nstarting over")
            discard_checkpoints()
            return attempt()


def _check(runs: Sequence[RunConfig]) -> None:
    """Raise UsageError or FileFault, with the run's title, where a run cannot be trained."""
    different: dict[Any, RunConfig] = {}
    for run in runs:
        recipe = run.workload.recipe
        samples = recipe.train_samples, recipe.batch_size, recipe.accumulate
        different.setdefault((run.reference, run.workload.source, samples), run)
    for run in different.values():
        try:
            check_trainable(run.workload, load_workload(run.reference).source)
        except FileFault:
            raise
        except UsageError as error:
            raise UsageError(f"{run.title}: {error}") from error


def _is_finished(kind: Kind, run: RunConfig) -> bool:
    """Whether a run's file is there and sound. A damaged one is removed, so that the run is done again."""
    path = kind.files.run(run.id)
    if not path.is_file():
        return False
    try:
        return kind.check(run)
    except DamagedFile as fault:
        print(f"{fault}\nwill be gathered again", flush=True)
        path.unlink()
        return False


def _job(run: RunConfig, kind: Kind, settings: Settings) -> Job:
    payload = {"id": run.id, "config": run.as_dict(), "device": settings.device_in_slot, **kind.payload(run)}
    files = tuple(str(path.relative_to(kind.files.root)) for path in kind.files_of(run.id))
    return Job(run.id, run.title, kind.target, payload, files)


def _pack(suite: Suite, kind: Kind, settings: Settings) -> str | None:
    """Pack the suite's runs. A shard does so only when the runs of all shards are there."""
    there = [run for run in suite.runs if kind.files.run(run.id).is_file()]
    if not there or (settings.shard[1] > 1 and len(there) < len(suite.runs)):
        return None
    return kind.pack(there)

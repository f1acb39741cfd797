"""Gathers trajectories: the runs of a suite that are not there yet, then one packed file and a table of them all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from collect.gather.plan import RunConfig, Suite
from collect.gather.trajectory_job import remove_checkpoint
from collect.jobs.local import Job, default_slots, run_jobs
from collect.training.device import pick_device
from data.sources import load_source
from data.trajectories.folder import GatherFolder
from data.trajectories.merge import MergeSummary, merge
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from predictor.errors import DamagedFile, UsageError
from predictor.shared.tracking import Tracker

_TARGET = "collect.gather.trajectory_job:record_run"
_HEADER = ("workload", "source", "runs", "diverged", "accuracy", "seconds a run")


@dataclass(frozen=True)
class Settings:
    """How a suite is gathered. None of it changes a number but the device."""

    device: str = "auto"
    """Where to train: auto, cpu, cuda, cuda:1, ... or mps."""
    slots: int | None = None
    """Runs at once; by default one a GPU, or one a CPU core where there is no GPU."""
    shard: tuple[int, int] = (1, 1)
    """Which part of the suite this machine does: the first of one."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots={self.slots}: give the number of runs at once, from 1")
        pick_device(self.device)

    @property
    def chosen_slots(self) -> int:
        """Runs at once."""
        return default_slots(self.device) if self.slots is None else self.slots


@dataclass(frozen=True)
class Gathered:
    """What a gathering came to."""

    trajectories: tuple[RunConfig, ...]
    """Runs of this shard that are there, those of earlier calls too."""
    failed: dict[str, str]
    """What was wrong with each run that is not, by its title, with the place of its log."""
    packed: MergeSummary | None
    """The packed file; None while runs of other shards are missing, and where there is nothing to pack."""


def gather(suite: Suite, files: GatherFolder, settings: Settings, tracker: Tracker) -> Gathered:
    """Do the runs of the suite, or of its shard, that are not there yet, and pack what is there.

    Killed at any time, the same call goes on: finished runs are kept, those in flight go on from their checkpoints or
    start over. A run that fails does not stop the others.

    Raises UsageError or FileFault for a device, source or folder that cannot be used.
    """
    runs = suite.shard(*settings.shard)
    for name, samples in {(run.workload.source, run.workload.recipe.train_samples) for run in runs}:
        load_source(name, train_samples=samples)
    waiting = [run for run in runs if not _finished(files, run)]
    _announce(suite, runs, waiting, settings)
    failed = _run_all(waiting, len(runs), files, settings, tracker, suite.checkpoint_seconds)
    there = tuple(run for run in runs if files.has_run(run.id))
    return Gathered(there, failed, _pack(suite, files, settings))


def describe_plan(suite: Suite, files: GatherFolder, settings: Settings) -> str:
    """What `gather` would do, one line a run."""
    runs = suite.shard(*settings.shard)
    states = [_state(files, run) for run in runs]
    lines = [f"{run.id}  {state:9}  {run.title}" for run, state in zip(runs, states, strict=True)]
    left = len(runs) - states.count("finished")
    return "\n".join([*lines, f"{suite.name}: {len(runs)} runs, {left} to do, {settings.chosen_slots} at a time"])


def summary_table(files: GatherFolder, runs: Sequence[RunConfig]) -> str:
    """One line a workload and source: runs, accuracy and time. Reads, and so verifies, every run."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        key = (run.reference, run.workload.source)
        groups.setdefault(key, []).append(_read(files, run.id).outcome)
    rows = [_HEADER, *(_row(*key, outcomes) for key, outcomes in groups.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def _run_all(
    waiting: list[RunConfig],
    total: int,
    files: GatherFolder,
    settings: Settings,
    tracker: Tracker,
    checkpoint_seconds: float,
) -> dict[str, str]:
    """Do the runs that wait; what was wrong with those that failed, by their titles."""
    failed: dict[str, str] = {}
    done = total - len(waiting)

    def keep(job: Job, outcome: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        figures = {name: outcome[name] for name in ("status", "final_accuracy", "final_loss", "train_seconds")}
        tracker.log({"run": job.id, "title": job.title, **figures}, step=done)

    def report(job: Job, error: str) -> None:
        failed[job.title] = f"{error} ({files.log(job.id)})"

    run_jobs(
        [_job(run, settings.device, checkpoint_seconds) for run in waiting],
        folder=files.root,
        slots=settings.chosen_slots,
        log=files.log,
        on_done=keep,
        on_failed=report,
        device=settings.device,
    )
    return failed


def _job(run: RunConfig, device: str, checkpoint_seconds: float) -> Job:
    in_slot = device.partition(":")[0]  # a slot sees one GPU alone, whichever it is
    payload = {"id": run.id, "config": run.as_dict(), "device": in_slot, "checkpoint_seconds": checkpoint_seconds}
    return Job(run.id, run.title, _TARGET, payload)


def _announce(suite: Suite, runs: Sequence[RunConfig], waiting: list[RunConfig], settings: Settings) -> None:
    number, count = settings.shard
    shard = f", shard {number}/{count}" if count > 1 else ""
    there = len(runs) - len(waiting)
    before = f", {there} of them there already" if there else ""
    print(f"gathering {suite.name}{shard}: {len(runs)} runs{before}, {settings.chosen_slots} at a time", flush=True)


def _state(files: GatherFolder, run: RunConfig) -> str:
    if files.has_run(run.id):
        return "finished"
    return "begun" if files.checkpoint(run.id).exists() else "to do"


def _finished(files: GatherFolder, run: RunConfig) -> bool:
    """Whether the run is there and sound. One that is damaged is removed, to be done again.

    Raises FileFault for one that may be sound but cannot be read: hours of work are not removed for that.
    """
    if not files.has_run(run.id):
        return False
    try:
        _read(files, run.id)
    except DamagedFile as fault:
        print(f"{fault}\nwill be gathered again", flush=True)
        files.run(run.id).unlink()
        return False
    remove_checkpoint(files, run.id)  # left there by a kill between the last two things that a run does
    return True


def _read(files: GatherFolder, run_id: str) -> Trajectory:
    with open_trajectories(files.run(run_id)) as file:
        return file.read(run_id)


def _pack(suite: Suite, files: GatherFolder, settings: Settings) -> MergeSummary | None:
    """Pack the suite's runs into one file; a shard does so only when the runs of all shards are there."""
    paths: list[Path] = [files.run(run.id) for run in suite.runs if files.has_run(run.id)]
    if not paths or (settings.shard[1] > 1 and len(paths) < len(suite.runs)):
        return None
    return merge(paths, files.packed)


def _row(workload: str, source: str, outcomes: list[dict[str, Any]]) -> tuple[str, ...]:
    accuracies = [outcome["final_accuracy"] for outcome in outcomes if outcome["status"] == "finished"]
    accuracy = f"{mean(accuracies):.3f}" if accuracies else "-"
    if len(accuracies) > 1:
        accuracy += f" ± {stdev(accuracies):.3f}"
    seconds = mean(outcome["train_seconds"] for outcome in outcomes)
    return workload, source, str(len(outcomes)), str(len(outcomes) - len(accuracies)), accuracy, f"{seconds:.1f}"

"""Gathers outcomes of freezing: the runs of a suite that are not there yet, and one packed file of them all."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collect.gather.continuation_plan import Choices
from collect.gather.plan import RunConfig, Suite
from collect.gather.trajectories import Settings
from collect.jobs.local import Job, run_jobs
from data.outcomes.records import Key, Outcome, OutcomeFolder, outcome_of, read_outcomes, write_outcomes
from data.sources import load_source
from predictor.errors import DamagedFile, UsageError
from predictor.shared.files import held, read_json_lines
from predictor.shared.tracking import Tracker

_TARGET = "collect.gather.outcome_job:record_outcomes"


@dataclass(frozen=True)
class GatheredOutcomes:
    """What a gathering of outcomes came to."""

    failed: dict[str, str]
    """What was wrong with each run that is not done, by its title, with the place of its log."""
    packed: Path | None
    """The packed file; None while runs of other shards are missing, and where there is nothing to pack."""


def gather_outcomes(
    suite: Suite, files: OutcomeFolder, settings: Settings, choices: Choices, tracker: Tracker
) -> GatheredOutcomes:
    """Do the runs of the suite, or of its shard, whose outcomes are not there yet, and pack what is there.

    Killed at any time, the same call goes on: runs that are done are kept, of those in flight each continuation that
    has ended, and the states that the others start from. A run that fails does not stop the others.

    Each training has one CPU thread, so that its numbers do not depend on how many run at once.

    Raises UsageError or FileFault for a device, source or folder that cannot be used.
    """
    runs = suite.shard(*settings.shard)
    for name, samples in {(run.workload.source, run.workload.recipe.train_samples) for run in runs}:
        load_source(name, train_samples=samples)
    waiting = [run for run in runs if not _done(files, run, choices)]
    _announce(suite, runs, waiting, settings, choices)
    failed: dict[str, str] = {}
    done = len(runs) - len(waiting)

    def keep(job: Job, figures: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        tracker.log({"run": job.id, "title": job.title, **figures}, step=done)
        _pack(suite, files, settings)

    def report(job: Job, error: str) -> None:
        failed[job.title] = f"{error} ({files.log(job.id)})"

    run_jobs(
        [_job(run, settings.device, choices) for run in waiting],
        folder=files.root,
        slots=settings.chosen_slots,
        log=files.log,
        on_done=keep,
        on_failed=report,
        threads=1,
        device=settings.device,
    )
    return GatheredOutcomes(failed, _pack(suite, files, settings))


def describe_plan(suite: Suite, files: OutcomeFolder, settings: Settings, choices: Choices) -> str:
    """What `gather_outcomes` would do, one line a run."""
    runs = suite.shard(*settings.shard)
    states = [_state(files, run, choices) for run in runs]
    lines = [f"{run.id}  {state:8}  {run.title}" for run, state in zip(runs, states, strict=True)]
    left = len(runs) - states.count("finished")
    end = f"{suite.name}: {len(runs)} runs, {left} to do, {settings.chosen_slots} at a time; {_each(choices)}"
    return "\n".join([*lines, end])


def _job(run: RunConfig, device: str, choices: Choices) -> Job:
    in_slot = device.partition(":")[0]  # a slot sees one GPU alone, whichever it is
    payload = {"id": run.id, "config": run.as_dict(), "choices": choices.as_dict(), "device": in_slot}
    return Job(run.id, run.title, _TARGET, payload)


def _announce(
    suite: Suite, runs: Sequence[RunConfig], waiting: list[RunConfig], settings: Settings, choices: Choices
) -> None:
    number, count = settings.shard
    shard = f", shard {number}/{count}" if count > 1 else ""
    there = len(runs) - len(waiting)
    before = f", {there} of them there already" if there else ""
    print(
        f"outcomes of {suite.name}{shard}: {len(runs)} runs{before}, {settings.chosen_slots} at a time; "
        f"{_each(choices)}",
        flush=True,
    )


def _each(choices: Choices) -> str:
    trainings = 1 + len(choices.fronts) + choices.singles
    return f"each goes on from {len(choices.points)} points, up to {trainings} times from each"


def _state(files: OutcomeFolder, run: RunConfig, choices: Choices) -> str:
    if files.run(run.id).is_file() and _has_all(read_outcomes(files.run(run.id)), choices):
        return "finished"
    return "begun" if files.under_way(run.id).exists() or files.run(run.id).is_file() else "to do"


def _done(files: OutcomeFolder, run: RunConfig, choices: Choices) -> bool:
    """Whether the run's outcomes are there and sound. A file that is damaged is removed, to be done again.

    Raises FileFault for one that may be sound but cannot be read: hours of work are not removed for that.
    """
    path = files.run(run.id)
    if not path.is_file():
        return False
    try:
        outcomes = read_outcomes(path)
    except DamagedFile as fault:
        print(f"{fault}\nwill be gathered again", flush=True)
        path.unlink()
        return False
    done = _has_all(outcomes, choices)
    if done:
        _clear(files, run.id, outcomes)
    return done


def _clear(files: OutcomeFolder, run_id: str, finished: Sequence[Outcome]) -> None:
    """Remove what a kill between the last two things that a run does has left of it.

    What was begun with other choices and broken off stays, and so does what another gather is at.
    """
    if not files.under_way(run_id).exists():
        return
    with contextlib.suppress(UsageError), held(files.log(run_id), "another gather"):
        known = {outcome.key for outcome in finished}
        if all(_key(row) in known for row in read_json_lines(files.so_far(run_id))):
            shutil.rmtree(files.under_way(run_id), ignore_errors=True)


def _key(row: dict[str, Any]) -> Key | None:
    """What a line of outcomes so far stands for; None where it is of another version."""
    try:
        return outcome_of(row).key
    except ValueError:
        return None


def _has_all(outcomes: Sequence[Outcome], choices: Choices) -> bool:
    """Whether a run was done with these choices. A file that was written for others is added to."""
    return any(outcome.facts.get("choices") == choices.as_dict() for outcome in outcomes)


def _pack(suite: Suite, files: OutcomeFolder, settings: Settings) -> Path | None:
    """Write the suite's outcomes into one file; a shard does so only when the runs of all shards are there."""
    paths = [files.run(run.id) for run in suite.runs if files.run(run.id).is_file()]
    if not paths or (settings.shard[1] > 1 and len(paths) < len(suite.runs)):
        return None
    write_outcomes(files.packed, (outcome for path in paths for outcome in read_outcomes(path)))
    return files.packed

"""Where jobs execute. `run_jobs` is the entrance: callers do not know the engine behind it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from collect.jobs.engine import Engine, Event, Job
from collect.jobs.gpus import visible_gpus
from collect.jobs.local import LocalEngine, default_slots
from collect.jobs.progress import JobProgress

__all__ = ["Engine", "Job", "default_slots", "run_jobs", "visible_gpus"]


def run_jobs(
    jobs: Sequence[Job],
    *,
    folder: Path,
    slots: int,
    log: Callable[[str], Path],
    on_done: Callable[[Job, dict[str, Any]], None],
    on_failed: Callable[[Job, str], None],
    threads: int | None = None,
    device: str = "auto",
    environment: Mapping[str, str] = MappingProxyType({}),
    engine: Engine | None = None,
) -> None:
    """Run jobs with a progress bar.

    Args:
        jobs: Started in this order.
        folder: Passed to every job.
        slots: Jobs at once; one slot runs strictly one after the other.
        log: The file for what a job prints, by the job's id.
        on_done: Takes the result of a job that ended well.
        on_failed: Takes a line that says why a job failed.
        threads: CPU threads of each slot; None divides the free cores among the slots.
        device: "cpu" hides all GPUs; "auto" and "cuda" give each slot one GPU, in turn.
        environment: What else the processes find in their environment.
        engine: Executes the jobs; by default the processes of this machine.
    """
    with JobProgress(len(jobs)) as progress:

        def report(job: Job, event: Event) -> None:
            if "share" in event:
                progress.update(job.id, event["share"])
            elif "done" in event:
                progress.finish(job.id, job.title)
                on_done(job, event["done"])
            else:
                progress.finish(job.id, f"FAILED {job.title}: {event['failed']}")
                on_failed(job, event["failed"])

        (engine or LocalEngine(slots, threads, device, environment)).run(jobs, folder, log, report)

"""Where jobs execute. `run_jobs` is the entrance: callers do not know the engine behind it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from collect.jobs.engine import Engine, Event, Job
from collect.jobs.gpus import visible_gpus
from collect.jobs.local import LocalEngine, default_slots
from collect.jobs.options import THIS_MACHINE, JobOptions, add_job_options, job_options
from collect.jobs.progress import JobProgress

__all__ = [
    "THIS_MACHINE",
    "Engine",
    "Job",
    "JobOptions",
    "LocalEngine",
    "add_job_options",
    "default_slots",
    "job_options",
    "run_jobs",
    "visible_gpus",
]


def run_jobs(
    jobs: Sequence[Job],
    *,
    folder: Path,
    slots: int | None,
    log: Callable[[str], Path],
    on_done: Callable[[Job, dict[str, Any]], None],
    on_failed: Callable[[Job, str], None],
    threads: int | None = None,
    device: str = "auto",
    environment: Mapping[str, str] = MappingProxyType({}),
    options: JobOptions = THIS_MACHINE,
) -> None:
    """Run jobs with a progress bar.

    Args:
        jobs: Started in this order.
        folder: Passed to every job.
        slots: Jobs at once; one slot runs strictly one after the other. None: as many as there is room for.
        log: The file for what a job prints, by the job's id.
        on_done: Takes the result of a job that ended well.
        on_failed: Takes a line that says why a job failed.
        threads: CPU threads of each slot; None divides the free cores among the slots.
        device: "cpu" hides all GPUs; "auto" and "cuda" give each slot one GPU, in turn.
        environment: What else the processes find in their environment.
        options: Which engine executes the jobs, and what each gets there; by default the processes of this machine.
    """
    engine = options.make_engine(slots, threads, device, environment)
    with JobProgress(len(jobs)) as progress:

        def report(job: Job, event: Event) -> None:
            if "share" in event:
                progress.update(job.id, event["share"], event.get("node", ""), event.get("gpus", 0.0))
            elif "note" in event:
                progress.note(f"{job.title}: {event['note']}")
            elif "done" in event:
                progress.finish(job.id, job.title)
                on_done(job, event["done"])
            else:
                progress.finish(job.id, f"FAILED {job.title}: {event['failed']}")
                on_failed(job, event["failed"])

        engine.run(jobs, folder, log, report)

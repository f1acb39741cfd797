"""Where jobs execute. `run_jobs` is the entrance: callers do not know the engine behind it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from collect.jobs.engine import Engine, Job
from collect.jobs.local import LocalEngine, default_slots, visible_gpus
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
    engine: Engine | None = None,
) -> None:
    """Run jobs with a progress bar. See `Engine.run` for `folder`, `log`, `on_done` and `on_failed`.

    Args:
        jobs: Started in this order.
        slots: Jobs at once; one slot runs strictly one after the other.
        threads: CPU threads of each slot; None divides the free cores among the slots.
        device: "cpu" hides all GPUs; "auto" and "cuda" give each slot one GPU, in turn.
        engine: Executes the jobs; by default the processes of this machine.
    """
    engine = engine or LocalEngine(slots, threads, device)
    with JobProgress(len(jobs)) as progress:

        def progressed(job: Job, share: float) -> None:
            progress.update(job.id, share)

        def done(job: Job, result: dict[str, Any]) -> None:
            progress.finish(job.id, job.title)
            on_done(job, result)

        def failed(job: Job, error: str) -> None:
            progress.finish(job.id, f"FAILED {job.title}: {error}")
            on_failed(job, error)

        engine.run(jobs, folder, log, on_progress=progressed, on_done=done, on_failed=failed)

"""The interface between those who have jobs and what executes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """A piece of work for a process of its own. All of it can be written as JSON."""

    id: str
    """The job's name in logs and reports."""
    title: str
    """The job's name on the progress bar."""
    target: str
    """`module:function`. The process calls it as function(payload, folder, progress). `folder` is a Path, and
    `progress` takes the share of the work that is done, from 0 to 1. The result must be JSON-able."""
    payload: dict[str, Any]
    """The function's first argument."""


class Engine(Protocol):
    """Executes jobs somewhere. A new engine has this one method."""

    def run(
        self,
        jobs: Sequence[Job],
        folder: Path,
        log: Callable[[str], Path],
        *,
        on_progress: Callable[[Job, float], None],
        on_done: Callable[[Job, dict[str, Any]], None],
        on_failed: Callable[[Job, str], None],
    ) -> None:
        """Run every job, in the order given, and return when all have ended.

        Callbacks run in the calling thread. A job that raises, or whose process dies, must not stop the others. When a
        callback raises, or Ctrl-C arrives, all jobs end at once.

        Args:
            jobs: What to run.
            folder: Passed to every job.
            log: The file for what a job prints, by the job's id.
            on_progress: Receives the share of a job that is done, from 0 to 1.
            on_done: Receives the result of a job that has ended well.
            on_failed: Receives one line that says why a job failed.
        """
        ...

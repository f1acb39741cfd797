"""The interface between callers that have jobs and the engine that executes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    files: tuple[str, ...] = ()
    """The files and folders below `folder` that the job finds there, such as its checkpoint. An engine elsewhere sends
    them along, and brings back what the job makes of them and what else it writes into the folder."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Files and folders that the job only reads, wherever they are here: paths by name. An engine elsewhere sends each
    once, and the job finds it below `folder` by its name. On this machine it does not, and reads the path itself."""


Event = dict[str, Any]
"""One of {"share": the share of a job that is done}, {"note": what happened to it, in a line}, {"done": its result} and
{"failed": why, in a line}. A share may come with "node", where the job runs, and "gpus", how many it has there."""


Report = Callable[[Job, Event], Job | None]
"""Takes an event of a job. When one has ended it may return another, which follows it."""


class Engine(Protocol):
    """Executes jobs somewhere. A new engine has this one method."""

    def run(self, jobs: Sequence[Job], folder: Path, log: Callable[[str], Path], report: Report) -> None:
        """Run every job, started in the order given, and return when all have ended.

        A job that raises, or whose process dies, must not stop the others. When `report` raises, or Ctrl-C arrives, all
        jobs end at once.

        Args:
            jobs: What to run.
            folder: Passed to every job.
            log: The file for what a job prints, by the job's id.
            report: Takes the events of each job, in the calling thread; the last is "done" or "failed", and what it
                returns then is a job that follows, started before those that wait.
        """
        ...

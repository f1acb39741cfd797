"""The engine of this machine: one persistent process a slot."""

import contextlib
import functools
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collect.jobs.engine import Event, Job, Report
from collect.jobs.gpus import environment_of, jobs_a_gpu, visible_gpus
from collect.jobs.process import WorkerProcess, process_environment
from predictor.errors import UsageError


@dataclass(frozen=True)
class LocalEngine:
    """Runs jobs in processes of this machine, one persistent process a slot.

    A process that dies fails its job and is replaced, and so is one whose GPU refuses all further work after an error,
    such as a failed assertion on the device. The processes end with this one, even when it is killed.
    """

    slots: int
    """Jobs at once."""
    threads: int | None = None
    """CPU threads of each slot; None divides the free cores among the slots."""
    device: str = "auto"
    """"cpu" hides all GPUs; "auto" and "cuda" give each slot one GPU, in turn."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What else the processes find in their environment."""
    run_timeout: float | None = None
    """Seconds that a job may take; None sets no limit."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UsageError(f"slots={self.slots}: give the number of jobs at once, from 1")

    def run(self, jobs: Sequence[Job], folder: Path, log: Callable[[str], Path], report: Report) -> None:
        """Run every job: see `Engine.run`. One for which a shared GPU was too full is run again at the end, alone."""
        environments = slot_environments(self.slots, threads=self.threads, device=self.device)
        alone = list({each["CUDA_VISIBLE_DEVICES"]: {**each, **self.environment} for each in environments}.values())
        crowded: list[Job] = []

        def report_all_but_crowded(job: Job, event: Event) -> Job | None:
            if event.pop("crowded", False) and len(environments) > len(alone) and alone[0]["CUDA_VISIBLE_DEVICES"]:
                crowded.append(job)
                return None
            return report(job, event)

        def reported(job: Job, event: Event) -> Job | None:
            event.pop("crowded", None)
            return report(job, event)

        self._run([{**each, **self.environment} for each in environments], jobs, folder, log, report_all_but_crowded)
        self._run(alone, crowded, folder, log, reported)

    def _run(
        self,
        environments: Sequence[dict[str, str]],
        jobs: Sequence[Job],
        folder: Path,
        log: Callable[[str], Path],
        report: Report,
    ) -> None:
        """Run jobs in a slot for each environment."""
        waiting = deque(jobs)
        events: queue.SimpleQueue[tuple[_Slot, Job, Event]] = queue.SimpleQueue()
        team = [
            _Slot(WorkerProcess(environment, self.run_timeout), events.put, folder, log)
            for environment in environments[: len(jobs)]
        ]
        try:
            for slot in team:
                slot.start(waiting.popleft())
            busy = len(team)
            while busy:
                slot, job, event = events.get()
                following = report(job, event)
                if "share" in event:
                    continue
                if following is not None:
                    waiting.appendleft(following)
                slot.give(waiting.popleft() if waiting else None)
                busy -= slot.ends
        finally:
            for slot in team:
                slot.stop()
            for slot in team:
                slot.join()


def free_cores() -> int:
    """The CPU cores that this process may use: its affinity, and its container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))  # int("max") raises: no quota
    return cores


def default_slots(device: str, sharing: bool = False) -> int:
    """As many jobs at once as there are GPUs, or CPU cores where there is no GPU to use.

    sharing: whether several jobs may share a GPU, where its memory holds them. Their times then compare nothing.
    """
    import torch

    if device in ("auto", "mps") and torch.backends.mps.is_available():
        return 1
    gpus = len(visible_gpus(device))
    if gpus and sharing:
        return gpus * max(1, min(jobs_a_gpu(device), free_cores() // gpus))
    return gpus or free_cores()


def slot_environments(slots: int, *, threads: int | None, device: str) -> list[dict[str, str]]:
    """What each slot's process finds in its environment besides ours: its threads, its GPU, where modules are."""
    gpus = visible_gpus(device)
    threads = threads or max(1, free_cores() // slots)
    shared = process_environment(threads)
    gpu_of_slot = itertools.cycle(gpus or ("",))
    return [{**shared, **environment_of(next(gpu_of_slot))} for _ in range(slots)]


class _Slot:
    """A thread that is given jobs and has a process do them."""

    def __init__(
        self,
        process: WorkerProcess,
        report: Callable[[tuple["_Slot", Job, Event]], None],
        folder: Path,
        log: Callable[[str], Path],
    ) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._process = process
        self._given: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._report = report
        self._folder, self._log = folder, log
        self.ends = False
        """Whether it gets no more jobs."""

    def start(self, job: Job) -> None:
        """Begin with the first job."""
        self.give(job)
        self._thread.start()

    def give(self, job: Job | None) -> None:
        """Give the next job, when it has reported the end of the one before; None for no more."""
        self.ends = job is None
        self._given.put(job)

    def join(self) -> None:
        """Wait until there are no more jobs, or the slot was stopped."""
        self._thread.join()

    def stop(self) -> None:
        """End the process at once, and start no other."""
        self.give(None)
        self._process.stop()

    def _run(self) -> None:
        while (job := self._given.get()) is not None:
            try:
                end = self._process.do(job, self._folder, self._log(job.id), functools.partial(self._pass_on, job))
            except Exception as error:  # no process, or a broken pipe: the caller must not wait for ever
                end = {"failed": f"its process could not be used: {error}"}
                self._process.end()
            self._report((self, job, end))
        self._process.end()

    def _pass_on(self, job: Job, event: Event) -> None:
        self._report((self, job, event))

"""The engine of a Ray cluster: Ray places the jobs and tries them again where a node or a process dies.

A job works in a folder of its own on its node, and what it writes comes back while it runs: the driver writes each file
whole or not at all. So another node, or the next command, goes on from the job's last checkpoint. Where a node sees the
driver's folder itself, the job works there. The driver must keep the order of three things: a job's files are written
before its end is reported; an attempt that Ray has given up writes nothing any more; and every job ends once.
"""

import contextlib
import os
import queue
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from collect.jobs.engine import Event, Job, Report
from collect.jobs.process import THREAD_SETTINGS
from collect.jobs.ray_cluster import connected, import_ray, refuse_open_cluster
from collect.jobs.ray_node import TOKEN_FILE, Changes, Mailbox, Order, WorkerDied, run_job, versions
from collect.jobs.sent_code import copy_code
from collect.training import provenance
from collect.training.provenance import COMMIT
from predictor.errors import FileFault, UsageError
from predictor.shared.files import held, written_whole

_SECONDS_TO_FETCH = 120.0
_SECONDS_TO_HANG_UP = 5.0
_SECONDS_TO_LOCK = 5.0
"""The process of an attempt that died on this machine may hold its lock a moment longer."""
_DECISIVE = ("SMARTFRZ_", "ATEN_", "ONEDNN_", "DNNL_", "MKL_", "KMP_", "OMP_", "CUBLAS_", "NVIDIA_TF32", "TORCH_")
"""How variables begin that decide how numbers are computed, and where data are: the nodes get ours."""


@dataclass(frozen=True)
class RayEngine:
    """Runs jobs on a Ray cluster."""

    address: str = "auto"
    """HOST:PORT of its head; "auto" for the cluster that this machine is part of."""
    slots: int | None = None
    """Jobs at once; None for as many as the cluster has room for."""
    threads: int = 1
    """CPU threads of a job."""
    cpus: float = 1.0
    """CPU cores that Ray sets aside for a job."""
    gpus: float = 0.0
    """GPUs of a job, also a part of one."""
    memory: int | None = None
    """Bytes of memory that Ray sets aside for a job."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What else the processes find in their environment."""
    run_timeout: float | None = None
    """Seconds that a job may take; None sets no limit."""
    attempts: int = 6
    """How often a job is tried whose node or process dies again and again."""
    looks_for_shared: bool = True
    """Whether nodes look for the driver's folder. Where they do not, everything is sent."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots={self.slots}: give the number of jobs at once, from 1")

    def run(self, jobs: Sequence[Job], folder: Path, log: Callable[[str], Path], report: Report) -> None:
        """Run every job: see `Engine.run`. Raises UsageError for a cluster that cannot be used."""
        import_ray()
        if not jobs:
            return
        with tempfile.TemporaryDirectory(prefix="smartfrz-code-") as code:
            copy_code(Path(code), {job.target.partition(":")[0] for job in jobs}, [folder])
            with connected(self.address, Path(code)) as context, _token(folder, self.looks_for_shared) as token:
                tqdm.write(_introduction(context, self))  # above a bar, where there is one
                _Driver(self, folder, token, log, report).run(jobs)


class _Driver:
    """One run of the engine: what is under way, and what happens to it."""

    def __init__(
        self,
        engine: RayEngine,
        folder: Path,
        token: str,
        log: Callable[[str], Path],
        report: Report,
    ) -> None:
        import ray

        self._ray, self._engine, self._folder, self._token = ray, engine, folder.resolve(), token
        self._log, self._report = log, report
        self._news: queue.SimpleQueue[tuple[Job | None, Any]] = queue.SimpleQueue()
        here = ray.get_runtime_context().get_node_id()
        beside = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 10_000}
        self._mailbox = ray.remote(Mailbox).options(**options, scheduling_strategy=beside).remote()
        self._task = ray.remote(max_calls=0)(run_job)  # with GPUs, too, a process does several jobs
        self._under_way: dict[str, _UnderWay] = {}
        self._full: set[str] = set()
        self._inputs: dict[tuple[str, str], Any] = {}
        """What was put into Ray's store of what jobs only read, by name and path."""
        self._environment = {**_decisive(), COMMIT: provenance.versions().get("commit", ""), **engine.environment}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run every job."""
        waiting = deque(jobs)
        for _ in range(min(len(jobs), self._engine.slots or len(jobs))):
            self._submit(waiting.popleft())
        self._listen()
        try:
            while self._under_way:
                ended, news = self._news.get()
                if ended is None:
                    self._listen()
                    for message in self._messages(news):
                        self._take(message)
                elif (event := self._end(ended, news)) is not None:
                    following = self._report(ended, event)
                    if following is not None:
                        waiting.appendleft(following)
                    if waiting:
                        self._submit(waiting.popleft())
        finally:
            for under_way in self._under_way.values():
                under_way.release()
        self._hang_up()

    def _submit(self, job: Job, gpus: float | None = None) -> None:
        """Give a job to Ray. gpus: more than the others get."""
        engine = self._engine
        under_way = self._under_way.setdefault(job.id, _UnderWay(job))
        order = Order(
            job=job,
            folder=str(self._folder),
            log=str(self._log(job.id).resolve()),
            token=self._token,
            threads=engine.threads,
            gpus=engine.gpus if gpus is None else gpus,
            environment=self._environment,
            seconds=engine.run_timeout,
        )
        options: dict[str, Any] = {
            "num_cpus": engine.cpus,
            "num_gpus": order.gpus,
            "memory": engine.memory,
            "max_retries": engine.attempts - 1,  # the driver counts too: Ray does not count what ran out of memory
            "retry_exceptions": [WorkerDied],
            "name": job.title,
        }
        if self._full:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._full))})"}
        under_way.gpus, under_way.was_lost = order.gpus, False
        under_way.task = self._task.options(**options).remote(order, self._mailbox)
        under_way.task.future().add_done_callback(lambda done: self._news.put((job, done)))

    def _listen(self) -> None:
        self._listening = self._mailbox.receive.remote().future()
        self._listening.add_done_callback(lambda done: self._news.put((None, done)))

    def _hang_up(self) -> None:
        """Have the mailbox answer once more: Ray complains of a question that is still open when the driver leaves."""
        self._mailbox.send.remote({})
        with contextlib.suppress(Exception):  # all jobs have ended
            self._listening.result(timeout=_SECONDS_TO_HANG_UP)

    def _messages(self, news: Any) -> list[dict[str, Any]]:
        try:
            messages: list[dict[str, Any]] = news.result()
            return messages
        except self._ray.exceptions.RayError as error:
            why = str(error).splitlines()[0]
            raise UsageError(f"the cluster is gone ({why}): start it again, and the same command goes on") from error

    def _take(self, message: dict[str, Any]) -> None:
        """Take a message of a job's attempt."""
        under_way = self._under_way.get(message["job"])
        if under_way is None:
            return
        if "begins" in message:
            self._begin(under_way, message)
        elif message["attempt"] == under_way.attempt:
            if "share" in message:
                self._report_share(under_way, message["share"])
            else:
                with contextlib.suppress(self._ray.exceptions.RayError):  # its node is gone: there will be others
                    self._write(under_way, self._ray.get(message["changes"][0], timeout=_SECONDS_TO_FETCH))

    def _begin(self, under_way: "_UnderWay", message: dict[str, Any]) -> None:
        """Let an attempt begin: it gets the job's files as they are here now."""
        job, node, attempt = under_way.job, message["node"], message["attempt"]
        if message["open"]:
            refuse_open_cluster()
        _refuse_other_versions(node["name"], message["versions"])
        if attempt != under_way.attempt:  # a mailbox that was started again asks again
            if under_way.was_lost:
                self._report(
                    job, {"note": f"{under_way.nodes[-1]} or its process there died; goes on at {node['name']}"}
                )
            under_way.attempt, under_way.was_lost, under_way.printed = attempt, True, 0
            under_way.nodes.append(node["name"])
        self._mailbox.answer.remote(attempt, self._answer(under_way, message["shared"]))
        self._report_share(under_way, 0.0)

    def _answer(self, under_way: "_UnderWay", shared: bool) -> dict[str, Any]:
        """What an attempt gets: the files, or the end where it is not to begin."""
        if len(under_way.nodes) > self._engine.attempts:
            return {"event": {"failed": under_way.how_it_died}}
        under_way.release()
        if shared:  # the job holds the lock itself
            return {}
        try:
            under_way.hold(self._log(under_way.job.id))
            return {"files": [self._ray.put(dict(self._files(under_way.job))), *self._inputs_of(under_way.job)]}
        except UsageError as error:
            return {"event": {"failed": str(error)}}

    def _report_share(self, under_way: "_UnderWay", share: float) -> None:
        self._report(under_way.job, {"share": share, "node": under_way.nodes[-1], "gpus": under_way.gpus})

    def _files(self, job: Job) -> Iterator[tuple[str, bytes]]:
        for name in job.files:
            yield from _contents(name, self._folder / name)

    def _inputs_of(self, job: Job) -> list[Any]:
        for each in job.inputs.items():
            if each not in self._inputs:
                self._inputs[each] = self._ray.put(dict(_contents(each[0], Path(each[1]))))
        return [self._inputs[each] for each in job.inputs.items()]

    def _end(self, job: Job, done: Any) -> Event | None:
        """Take the end of a task. Returns the last event of its job; None where that goes on."""
        under_way = self._under_way[job.id]
        event = self._event(under_way, done)
        if event is not None:
            del self._under_way[job.id]
            under_way.release()
        return event

    def _event(self, under_way: "_UnderWay", done: Any) -> Event | None:
        """How a job ended; None where it was given to Ray once more."""
        try:
            result = done.result()
        except self._ray.exceptions.RuntimeEnvSetupError as error:
            raise UsageError(f"a node could not set up the code that was sent: {error}") from error
        except self._ray.exceptions.RayTaskError as error:
            died = isinstance(error.cause, WorkerDied)
            return {"failed": f"{error.cause}; {under_way.how_it_died}" if died else f"{error.cause!r}"}
        except Exception as error:  # of Ray: the node or the process is gone for good
            return {"failed": under_way.how_it_died if under_way.nodes else f"Ray could not run it: {error}"}
        event, node = dict(result["event"]), result["node"]
        if result["changes"] is not None and result["attempt"] == under_way.attempt:
            self._write(under_way, result["changes"])
        if event.pop("full", False) and not result["shared"]:
            self._full.add(node["id"])
            if any(each["Alive"] and each["NodeID"] not in self._full for each in self._ray.nodes()):
                note = f"the disk of {node['name']} is full: goes on elsewhere, and no more runs go there"
                self._report(under_way.job, {"note": note})
                self._submit(under_way.job)
                return None
        if event.pop("crowded", False) and 0 < under_way.gpus < 1:
            self._submit(under_way.job, gpus=1.0)
            return None
        return event if "done" in event else {"failed": f"{event['failed']} (on {node['name']})"}

    def _write(self, under_way: "_UnderWay", changes: Changes) -> None:
        """Write what a job has changed: files first, so that a checkpoint goes when the result is there."""
        for name, content in changes.files.items():
            with written_whole(self._inside(name)) as part:
                part.write_bytes(content)
        for name in changes.removed:
            path = self._inside(name)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                if str(path.parent.relative_to(self._folder)) in under_way.job.files:
                    path.parent.rmdir()
        if changes.offset <= under_way.printed:  # otherwise something was lost, which comes with the end
            printed = changes.printed[under_way.printed - changes.offset :]
            under_way.printed += len(printed)
            _append(self._log(under_way.job.id), printed)

    def _inside(self, name: str) -> Path:
        path = self._folder / name
        if ".." in path.parts or not path.is_relative_to(self._folder):
            raise UsageError(f"a node sends a file {name!r}: it is outside of {self._folder}")
        return path


class _UnderWay:
    """A job that Ray has, with its latest attempt."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.attempt = ""
        self.nodes: list[str] = []
        """Where it was tried, one name an attempt."""
        self.was_lost = False
        """Whether a further attempt can only be because this one was lost."""
        self.printed = 0
        """Bytes of the attempt's log that are in ours."""
        self.gpus = 0.0
        self.task: Any = None
        self._lock = contextlib.ExitStack()

    @property
    def how_it_died(self) -> str:
        """Why Ray has given it up."""
        return f"its process or node died {len(self.nodes)} times, on {', '.join(dict.fromkeys(self.nodes))}"

    def hold(self, log: Path) -> None:
        """Hold the lock that the job itself holds where it works in the folder. UsageError where another has it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(log, "another gather", _SECONDS_TO_LOCK))
            self._lock = stack.pop_all()

    def release(self) -> None:
        """Give the lock back."""
        self._lock.close()


def _contents(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a path, whole, each by its name below the name that the path has in a job's folder."""
    if path.is_dir():
        found = [(str(Path(name, file.relative_to(path))), file) for file in sorted(path.rglob("*"))]
    else:
        found = [(name, path)]
    for inside, file in found:
        if file.is_file() and not file.name.endswith(".part"):
            yield inside, file.read_bytes()


@contextlib.contextmanager
def _token(folder: Path, wanted: bool) -> Iterator[str]:
    """What a file holds by which nodes find out whether they share the folder; nothing where they are not to."""
    if not wanted:
        yield ""
        return
    token = uuid.uuid4().hex
    with written_whole(folder / TOKEN_FILE) as part:
        part.write_text(token, encoding="ascii")
    try:
        yield token
    finally:
        (folder / TOKEN_FILE).unlink(missing_ok=True)


def _append(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:
        raise FileFault(
            f"{path}: cannot be written ({error.strerror}): free some space, or choose another --out"
        ) from error


def _refuse_other_versions(node: str, theirs: Mapping[str, str]) -> None:
    ours = versions()
    odd = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if odd:
        differing = ", ".join(
            f"{name} {theirs.get(name, 'missing')} there, {ours.get(name, 'missing')} here" for name in odd
        )
        raise UsageError(f"node {node} has other versions than this machine ({differing}): install the same on both")


def _decisive() -> dict[str, str]:
    names = [name for name in os.environ if name.startswith(_DECISIVE) and name not in THREAD_SETTINGS]
    return {name: os.environ[name] for name in names}


def _introduction(context: Any, engine: RayEngine) -> str:
    """A line on the cluster."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0)
    text = f"Ray: nodes: {len(nodes)}, CPUs: {total.get('CPU', 0):g}, GPUs: {gpus:g}"
    if context.dashboard_url:
        text += f"; dashboard http://{context.dashboard_url}"
    wanted = {"CPU": engine.cpus, "GPU": engine.gpus, "memory": engine.memory or 0}
    if not any(all(node["Resources"].get(name, 0) >= much for name, much in wanted.items()) for node in nodes):
        text += f"\nno node has {engine.cpus:g} CPUs and {engine.gpus:g} GPUs for a run: waiting for one that has"
    elif gpus and not engine.gpus:
        text += "\nruns use no GPU: --device cuda or --gpus-per-run gives them one"
    return text

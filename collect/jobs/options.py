"""Which engine executes jobs, and what each job gets there: the options that all commands with jobs share."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from collect.jobs.engine import Engine
from predictor.errors import UsageError
from predictor.shared import flags
from predictor.shared.flags import option


@dataclass(frozen=True)
class JobOptions:
    """How jobs are executed. None of it changes a number, but for the device and a job's threads."""

    engine: Literal["local", "ray"] = option("local", "local: the processes of this machine; ray: a Ray cluster")
    address: str = option("auto", "the cluster's head as HOST:PORT; auto finds the one that this machine is part of")
    gpus_per_run: float | None = option(
        None, "ray: GPUs of a run, also a part of one such as 0.25; without: 1 with CUDA"
    )
    cpus_per_run: float = option(1.0, "ray: CPU cores of a run, which then has as many threads")
    memory_per_run: float | None = option(None, "ray: GB of memory that a node must have free for a run")
    run_timeout: float | None = option(None, "seconds after which a run is ended as failed; without: no limit")

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine={self.engine!r}: choose local or ray")
        for name in ("cpus_per_run", "memory_per_run", "run_timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name}={value:g}: give a number above 0")
        gpus = self.gpus_per_run
        if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus.is_integer())):
            raise UsageError(f"gpus_per_run={gpus:g}: give a part of one GPU, such as 0.25, or a whole number")
        if self.engine == "local":
            self._refuse_without_cluster()

    @property
    def one_machine(self) -> bool:
        """Whether all jobs run on this machine, so that their seconds compare."""
        return self.engine == "local"

    def slots(self, given: int | None, device: str, sharing: bool = False) -> int | None:
        """Jobs at once; None for as many as the cluster has room for.

        Args:
            given: What the user asked for.
            device: Where to train, as `--device` takes it.
            sharing: Whether jobs may share a GPU: see `default_slots`.
        """
        from collect.jobs.local import default_slots

        return given if given is not None or not self.one_machine else default_slots(device, sharing)

    def device(self, given: str) -> str:
        """The device as a job is told: on a cluster this machine need not have it."""
        if self.one_machine:
            return given
        if given not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device {given}: on a cluster give auto, cpu or cuda, and Ray says which GPU")
        return "cuda" if self._gpus(given) else "cpu"

    def make_engine(
        self, slots: int | None, threads: int | None, device: str, environment: Mapping[str, str]
    ) -> Engine:
        """The engine.

        Args:
            slots: Jobs at once.
            threads: CPU threads of each job; None divides the cores.
            device: Where to train, as `--device` takes it.
            environment: What else the processes find in their environment.
        """
        import collect.jobs as jobs

        if self.one_machine:
            count = self.slots(slots, device)
            return jobs.LocalEngine(1 if count is None else count, threads, device, environment, self.run_timeout)
        from collect.jobs.ray import RayEngine

        return RayEngine(
            address=self.address,
            slots=slots,
            threads=threads or max(1, int(self.cpus_per_run)),
            cpus=self.cpus_per_run,
            gpus=self._gpus(device),
            memory=None if self.memory_per_run is None else int(self.memory_per_run * 1e9),
            environment=environment,
            run_timeout=self.run_timeout,
        )

    def _gpus(self, device: str) -> float:
        """GPUs of a job on a cluster."""
        from collect.jobs.gpus import visible_gpus

        if device == "cpu":
            return 0.0
        if self.gpus_per_run is None:
            return 1.0 if device == "cuda" or visible_gpus("auto") else 0.0
        if device == "cuda" and not self.gpus_per_run:
            raise UsageError("gpus_per_run=0 with --device cuda: give a GPU or a part of one, or --device cpu")
        return self.gpus_per_run

    def _refuse_without_cluster(self) -> None:
        default = JobOptions.__dataclass_fields__
        for name in ("address", "gpus_per_run", "cpus_per_run", "memory_per_run"):
            value = getattr(self, name)
            if value != default[name].default:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {value}: is for a cluster: add --engine ray, or leave it out")


THIS_MACHINE = JobOptions()
"""Everything runs here."""


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `JobOptions`."""
    flags.add_fields(parser.add_argument_group("where runs execute"), JobOptions)  # type: ignore[arg-type]


def job_options(given: argparse.Namespace) -> JobOptions:
    """The options that the flags of `add_job_options` gave."""
    return flags.from_flags(JobOptions, given)

"""Gathers trajectories: what is kept of each run, and the job that trains and records one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from collect.gather.gathering import Kind, State, attempted
from collect.gather.plan import RunConfig
from collect.hooks.cka import CKARecorder
from collect.hooks.recorder import Recorder
from collect.training.loop import Training, train
from collect.training.provenance import provenance
from data.trajectories.folder import GatherFolder
from data.trajectories.merge import merge, stored_digest
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from data.trajectories.writer import write_runs

_HEADER = ("workload", "source", "runs", "diverged", "accuracy", "seconds a run")


class Trajectories(Kind):
    """The movement of each run's layers, in one HDF5 file.

    A run is decoded once: where it is there already, before the first training, and otherwise when it is packed.

    Args:
        files: Where the files go.
        checkpoint_seconds: Time between the checkpoints of a run.
    """

    title = "gathering"
    target = f"{__name__}:record_run"

    def __init__(self, files: GatherFolder, checkpoint_seconds: float) -> None:
        self.files: GatherFolder = files
        self._checkpoint_seconds = checkpoint_seconds
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._verified: dict[str, str] = {}

    @property
    def next_command(self) -> str:
        """The command that learns from the packed file."""
        return "python -m predictor train"

    def state(self, run: RunConfig) -> State:
        """The state of a run, by the files that exist."""
        if self.files.has_run(run.id):
            return "finished"
        return "begun" if self.files.checkpoint(run.id).exists() else "to do"

    def check(self, run: RunConfig) -> bool:
        """Verify a run's file, and keep its outcome."""
        with open_trajectories(self.files.run(run.id)) as file:
            self._outcomes[run.id] = file.read(run.id).outcome
            self._verified[run.id] = stored_digest(file, run.id)
        _remove_checkpoint(self.files, run.id)  # a kill can leave it, between the last two things that a run does
        return True

    def payload(self, run: RunConfig) -> dict[str, Any]:
        """The time between checkpoints."""
        return {"checkpoint_seconds": self._checkpoint_seconds}

    def files_of(self, run_id: str) -> Sequence[Path]:
        """The checkpoint."""
        return (self.files.checkpoint(run_id),)

    def take(self, run_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Keep a run's outcome for the table."""
        self._outcomes[run_id] = result
        return {name: result[name] for name in ("status", "final_accuracy", "final_loss", "train_seconds")}

    def pack(self, runs: Sequence[RunConfig]) -> str:
        """Copy the runs into one file."""
        return str(merge([self.files.run(run.id) for run in runs], self.files.packed, verified=self._verified))

    def table(self, runs: Sequence[RunConfig]) -> str:
        """One line a workload and source: runs, accuracy and time."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in runs:
            if run.id not in self._outcomes:  # done by another gather meanwhile
                self.check(run)
            groups.setdefault((run.reference, run.workload.source), []).append(self._outcomes[run.id])
        rows = [_row(*key, outcomes) for key, outcomes in groups.items()]
        if not rows:
            return ""
        align = ("left", "left", *["right"] * 4)
        return tabulate(rows, _HEADER, "plain", disable_numparse=True, colalign=align)


def record_run(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Train and record one run, write its file into the gather folder, and return its outcome.

    Args:
        payload: The run's `id`, its `config` (`RunConfig.as_dict`), `device` and `checkpoint_seconds`.
        folder: The root of the `GatherFolder`.
        progress: Receives the share of the training that is done.
    """
    files, run_id = GatherFolder(folder), payload["id"]

    def attempt() -> dict[str, Any]:
        trajectory = _recorded(payload, files.checkpoint(run_id), progress)
        write_runs(files.run(run_id), [trajectory])
        _remove_checkpoint(files, run_id)
        return trajectory.outcome

    outcome = attempted(files.log(run_id), attempt, lambda: _remove_checkpoint(files, run_id))
    print(f"outcome: {outcome}")
    return outcome


def outcome_of(training: Training) -> dict[str, Any]:
    """The part `outcome` of a training's trajectory. A training that diverged has no final accuracy and loss."""
    last = training.curve[-1] if training.status == "finished" else {}
    return {
        "status": training.status,
        "final_accuracy": last.get("test_accuracy"),
        "final_loss": last.get("test_loss"),
        "train_seconds": training.train_seconds,
        "cpu_seconds": training.cpu_seconds,
        "steps": training.step,
        "curve": training.curve,
    }


def _recorded(payload: dict[str, Any], checkpoint: Path, progress: Callable[[float], None]) -> Trajectory:
    run = RunConfig.from_dict(payload["config"])
    recorder, similarity = Recorder(run.sampling), CKARecorder(run.sampling, run.probe)
    training = train(
        run.workload,
        seed=run.seed,
        hooks=(recorder, similarity),
        device=payload["device"],
        checkpoint=checkpoint,
        checkpoint_seconds=payload["checkpoint_seconds"],
        progress=lambda step, total: progress(step / total),
    )
    return Trajectory(
        run_id=payload["id"],
        config={**payload["config"], "total_steps": training.total_steps},
        provenance=provenance(),
        outcome=outcome_of(training),
        similarity_TL=similarity.similarity_TL,
        **recorder.fields(),
    )


def _remove_checkpoint(files: GatherFolder, run_id: str) -> None:
    """Remove a run's checkpoint, and one that a kill left half written."""
    path = files.checkpoint(run_id)
    for file in (path, path.with_name(path.name + ".part")):
        file.unlink(missing_ok=True)


def _row(workload: str, source: str, outcomes: list[dict[str, Any]]) -> tuple[str, ...]:
    accuracies = [outcome["final_accuracy"] for outcome in outcomes if outcome["status"] == "finished"]
    accuracy = f"{mean(accuracies):.3f}" if accuracies else "-"
    if len(accuracies) > 1:
        accuracy += f" ± {stdev(accuracies):.3f}"
    seconds = mean(outcome["train_seconds"] for outcome in outcomes)
    return workload, source, str(len(outcomes)), str(len(outcomes) - len(accuracies)), accuracy, f"{seconds:.1f}"

"""One run of a gathering, in the process of its slot: trained, recorded, compared, written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from collect.gather.plan import RunConfig
from collect.hooks.cka import Similarity
from collect.hooks.recorder import Recorder
from collect.training.checkpoint import CheckpointFault
from collect.training.loop import Training, train
from collect.training.provenance import provenance
from data.trajectories.folder import GatherFolder
from data.trajectories.trajectory import Trajectory
from data.trajectories.writer import write_runs
from predictor.shared.files import held

_LOCK_SECONDS = 20.0


def record_run(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Train and record the run of `payload`, write its file into the gather folder, and return its outcome.

    payload: `config` of the run (`RunConfig.as_dict`), its `id`, `device`, and `checkpoint_seconds`.
    """
    files, run_id = GatherFolder(folder), payload["id"]
    run = RunConfig.from_dict(payload["config"])
    recorder, similarity = Recorder(run.sampling), Similarity(run.sampling, run.probe)
    # Against a second gather, and against a slot that outlives its killed parent for a moment.
    with held(files.log(run_id), "another gather", _LOCK_SECONDS):
        training = _go_on_or_start_over(
            lambda: train(
                run.workload,
                seed=run.seed,
                hooks=(recorder, similarity),
                device=payload["device"],
                checkpoint=files.checkpoint(run_id),
                checkpoint_seconds=payload["checkpoint_seconds"],
                progress=lambda step, total: progress(step / total),
            ),
            files.checkpoint(run_id),
        )
        trajectory = Trajectory(
            run_id=run_id,
            config={**payload["config"], "total_steps": training.total_steps},
            provenance=provenance(),
            outcome=outcome_of(training),
            similarity_TL=similarity.similarity_TL,
            **recorder.fields(),
        )
        write_runs(files.run(run_id), [trajectory])
        remove_checkpoint(files, run_id)
    print(f"outcome: {trajectory.outcome}")
    return trajectory.outcome


def outcome_of(training: Training) -> dict[str, Any]:
    """What became of a training: the part `outcome` of its trajectory. Diverged: no final accuracy and loss."""
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


def remove_checkpoint(files: GatherFolder, run_id: str) -> None:
    """Remove what a run went on from, and what a kill left of one that was being written."""
    path = files.checkpoint(run_id)
    for file in (path, path.with_name(path.name + ".part")):
        file.unlink(missing_ok=True)


def _go_on_or_start_over(attempt: Callable[[], Training], checkpoint: Path) -> Training:
    try:
        return attempt()
    except CheckpointFault as fault:  # not a full disk or a missing image: the checkpoint outlives those
        # A checkpoint is worth minutes: what is wrong with it is not worth the user's time.
        print(f"{fault}\nstarting over")
        checkpoint.unlink(missing_ok=True)
        return attempt()

"""Where outcomes are on the disk. Every file name is made here."""

from dataclasses import dataclass
from pathlib import Path

from data.trajectories.folder import GatherFolder

DEFAULT_FOLDER = Path("runs/outcomes")
DEFAULT_OUTCOMES = Path("runs/outcomes.jsonl")


@dataclass(frozen=True)
class OutcomeFolder:
    """The files that `gather outcomes` writes: one a run, logs and unfinished work, and beside them the packed file."""

    root: Path = DEFAULT_FOLDER

    def run(self, run_id: str) -> Path:
        """All outcomes of a finished run."""
        return self._as_trajectories.run(run_id).with_suffix(".jsonl")

    def log(self, run_id: str) -> Path:
        """What the run's process printed."""
        return self._as_trajectories.log(run_id)

    def under_way(self, run_id: str) -> Path:
        """The folder of a run in progress: its states, and the outcomes so far."""
        return self._as_trajectories.checkpoint(run_id).with_suffix("")

    def state(self, run_id: str, step: int) -> Path:
        """The state of a run after so many steps, from which its continuations start."""
        return self.under_way(run_id) / f"step-{step}.pt"

    def state_in_use(self, run_id: str) -> Path:
        """The copy of a state that the current training starts from."""
        return self.under_way(run_id) / "in-use.pt"

    def states(self, run_id: str) -> list[Path]:
        """All states of a run that exist."""
        return sorted(self.under_way(run_id).glob("*.pt"))

    def so_far(self, run_id: str) -> Path:
        """The outcomes of a run in progress, each appended when it is known."""
        return self.under_way(run_id) / "outcomes.jsonl"

    @property
    def packed(self) -> Path:
        """The outcomes of all runs in one file."""
        return self.root.with_name(self.root.name + ".jsonl")

    @property
    def _as_trajectories(self) -> GatherFolder:
        return GatherFolder(self.root)

"""Where trajectories are on the disk. Every file name is made here."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.trajectories.schema import is_run_id
from predictor.errors import FileFault, UsageError

DEFAULT_FOLDER = Path("runs/trajectories")
DEFAULT_FILE = Path("runs/trajectories.h5")


@dataclass(frozen=True)
class GatherFolder:
    """The files that a gather writes: one a run, logs and checkpoints below `root`, and beside it the packed file."""

    root: Path = DEFAULT_FOLDER

    def run(self, run_id: str) -> Path:
        """The trajectory of a run that has ended."""
        return self.root / "runs" / f"{_checked(run_id)}.h5"

    def log(self, run_id: str) -> Path:
        """What the run's process printed."""
        return self.root / "logs" / f"{_checked(run_id)}.log"

    def checkpoint(self, run_id: str) -> Path:
        """Where an interrupted run continues from."""
        return self.root / "checkpoints" / f"{_checked(run_id)}.pt"

    def has_run(self, run_id: str) -> bool:
        """Whether the run has ended and its trajectory is there."""
        return self.run(run_id).is_file()

    @property
    def runs(self) -> list[Path]:
        """The trajectories of all runs that have ended, by id."""
        return sorted((self.root / "runs").glob("*.h5"))

    @property
    def packed(self) -> Path:
        """All runs in one file."""
        return self.root.with_name(self.root.name + ".h5")


def trajectory_files(paths: Iterable[Path]) -> list[Path]:
    """The trajectory files of paths: a file itself, or the runs of a gather folder. FileFault for an empty folder."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = GatherFolder(path).runs if path.is_dir() else [path]
        if not inside:
            raise FileFault(f"{path}: a folder without runs: gather some with `python -m collect gather trajectories`")
        found += inside
    return found


def _checked(run_id: str) -> str:
    if not is_run_id(run_id):
        raise UsageError(f"run_id={run_id!r}: give up to 100 letters, digits, `.`, `_` and `-`")
    return run_id

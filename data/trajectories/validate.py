"""Finds every fault of a trajectory file, not only the first."""

from pathlib import Path

from tqdm import tqdm

from data.trajectories.reader import TrajectoryFile
from predictor.errors import FileFault


def validate(path: Path, *, progress: bool = False) -> list[FileFault]:
    """Every fault of a file, of its runs and of their fields. The list is empty when each run can be read."""
    try:
        file = TrajectoryFile(path)
    except FileFault as fault:
        return [fault]
    with file:
        faults = list(file.faults)
        for run_id in tqdm(file.run_ids, desc=f"checking {path}", unit="run", leave=False, disable=not progress):
            faults += file.examine(run_id)[1]
    return faults

"""Puts the runs of many trajectory files into one, as real copies whose checksums are verified afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data.trajectories.folder import trajectory_files
from data.trajectories.reader import open_trajectories
from data.trajectories.writer import NewRuns, new_file
from predictor.errors import FileFault, UsageError
from predictor.shared.files import written_whole

OnDuplicate = Literal["refuse", "skip"]


@dataclass(frozen=True)
class MergeSummary:
    """What a merge did."""

    path: Path
    runs: int
    files: int
    skipped: tuple[str, ...]
    """Ids of runs that were there already."""
    size_bytes: int

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} duplicates skipped" if self.skipped else ""
        return f"{self.path}: {self.runs} runs from {self.files} files{skipped}, {self.size_bytes / 1e6:.1f} MB"


def merge(
    paths: Sequence[Path], out: Path, on_duplicate: OnDuplicate = "refuse", *, progress: bool = False
) -> MergeSummary:
    """Copy every run of `paths` (trajectory files, or gather folders) into the new file `out`.

    Every run is verified before it is copied, and again in the new file; `out` appears only when all is well, and may
    be one of `paths`. No links: with a link, a source that goes missing would read as zeros.

    on_duplicate: "refuse" raises UsageError for a run id that comes twice; "skip" keeps the one that comes first.
    """
    files = trajectory_files(paths)
    if not files:
        raise UsageError("nothing to merge: name at least one trajectory file or gather folder")
    skipped: list[str] = []
    sources: dict[str, tuple[Path, str]] = {}
    with written_whole(Path(out)) as part:
        with new_file(part) as runs:
            for path in tqdm(files, desc="merging", unit="file", disable=not progress):
                skipped += _copy_all(path, runs, sources, on_duplicate)
        _verify(part, sources, progress)
    return MergeSummary(Path(out), len(sources), len(files), tuple(skipped), Path(out).stat().st_size)


def _copy_all(path: Path, runs: NewRuns, sources: dict[str, tuple[Path, str]], on_duplicate: OnDuplicate) -> list[str]:
    """Copy a file's runs and note, in `sources`, where each came from and its checksum. Returns those left out."""
    skipped = []
    with open_trajectories(path) as source:
        for run_id in source.run_ids:
            if run_id in sources:
                if on_duplicate == "refuse":
                    raise UsageError(
                        f"run {run_id}: is in {sources[run_id][0]} and in {path}: leave one of them out, or skip "
                        "duplicates (--on-duplicate skip)"
                    )
                skipped.append(run_id)
                continue
            source.read(run_id)
            runs.copy(source, run_id)
            sources[run_id] = (path, source.checksum(run_id))
    return skipped


def _verify(part: Path, sources: dict[str, tuple[Path, str]], progress: bool) -> None:
    with open_trajectories(part) as copies:
        for run_id, (path, checksum) in tqdm(sources.items(), desc="verifying", unit="run", disable=not progress):
            copies.read(run_id)
            if copies.checksum(run_id) != checksum:
                raise FileFault(
                    f"{path}: run {run_id}: changed while it was copied: merge again when nothing writes it"
                )

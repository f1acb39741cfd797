"""Puts the runs of many trajectory files into one: real copies, with the stored bytes that were verified."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from tqdm import tqdm

from data.trajectories.folder import trajectory_files
from data.trajectories.reader import TrajectoryFile, open_trajectories
from data.trajectories.writer import NewRuns, new_file
from predictor.errors import FileFault, UsageError
from predictor.shared.files import written_whole

OnDuplicate = Literal["refuse", "skip"]


@dataclass(frozen=True)
class MergeSummary:
    """The result of a merge."""

    path: Path
    runs: int
    files: int
    skipped: tuple[str, ...]
    """Ids of duplicates that were left out."""
    size_bytes: int

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} duplicates skipped" if self.skipped else ""
        return f"{self.path}: {self.runs} runs from {self.files} files{skipped}, {self.size_bytes / 1e6:.1f} MB"


def merge(
    paths: Sequence[Path],
    out: Path,
    on_duplicate: OnDuplicate = "refuse",
    *,
    progress: bool = False,
    verified: Mapping[str, str] = MappingProxyType({}),
) -> MergeSummary:
    """Copy every run of trajectory files into one new file.

    Each run is decoded once, to verify it against its checksum; its copy has to hold the same stored bytes. `out`
    appears only when all is well, and may be one of `paths`. The copies are no links: a link to a file that goes
    missing reads as zeros.

    Args:
        paths: Trajectory files, and gather folders.
        out: The new file.
        on_duplicate: "refuse" raises UsageError for a run id that comes twice; "skip" keeps the first.
        progress: Whether to show a progress bar.
        verified: The `stored_digest` of runs that the caller has verified, by their ids. They are not decoded again.

    Raises:
        UsageError: There is nothing to merge, or a duplicate.
        FileFault: A file that is unsound, or that changes meanwhile.
    """
    files = trajectory_files(paths)
    if not files:
        raise UsageError("nothing to merge: name at least one trajectory file or gather folder")
    skipped: list[str] = []
    sources: dict[str, tuple[Path, str]] = {}
    with written_whole(Path(out)) as part:
        with new_file(part) as runs:
            for path in tqdm(files, desc="merging", unit="file", disable=not progress):
                skipped += _copy_all(path, runs, sources, on_duplicate, verified)
        with open_trajectories(part) as copies:
            for run_id, (path, digest) in sources.items():
                if stored_digest(copies, run_id) != digest:
                    cure = "merge again when nothing writes the file, and check the disk"
                    raise FileFault(f"{path}: run {run_id}: its copy is not what was verified: {cure}")
    return MergeSummary(Path(out), len(sources), len(files), tuple(skipped), Path(out).stat().st_size)


def stored_digest(file: TrajectoryFile, run_id: str) -> str:
    """SHA-256 of a run as a file stores it, compressed. Read the run first to know that it is sound."""
    stored = file.stored(run_id)
    digest = hashlib.sha256(stored.sha256.encode())
    for name, (shape, mask, raw) in sorted(stored.chunks.items()):
        digest.update(f"{name} {shape} {mask} {len(raw)}\n".encode())
        digest.update(raw)
    return digest.hexdigest()


def _copy_all(
    path: Path,
    runs: NewRuns,
    sources: dict[str, tuple[Path, str]],
    on_duplicate: OnDuplicate,
    verified: Mapping[str, str],
) -> list[str]:
    """Copy a file's runs, and add each to `sources`, with its file and digest. Returns the ids of duplicates."""
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
            if run_id not in verified:
                source.read(run_id)
            sources[run_id] = path, verified.get(run_id) or stored_digest(source, run_id)
            runs.copy(source, run_id)
    return skipped

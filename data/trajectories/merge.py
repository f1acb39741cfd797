"""Puts the runs of many trajectory files into one: real copies, compared with their sources byte by byte."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import h5py
from tqdm import tqdm

from data.trajectories.folder import trajectory_files
from data.trajectories.reader import open_trajectories
from data.trajectories.writer import NewRuns, new_file
from predictor.errors import FileFault, UsageError
from predictor.shared.files import written_whole

OnDuplicate = Literal["refuse", "skip"]
Stamp = tuple[int, int, int]
"""A file's time of change in nanoseconds, its size and its inode: another one means that the file may have changed."""


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
    verified: Mapping[Path, Stamp] = MappingProxyType({}),
) -> MergeSummary:
    """Copy every run of trajectory files into one new file.

    Each run is decoded once, to verify it against its checksum. Its copy has to hold the same stored bytes. `out`
    appears only when all is well, and may be one of `paths`. The copies are no links: a link to a file that goes
    missing reads as zeros.

    Args:
        paths: Trajectory files, and gather folders.
        out: The new file.
        on_duplicate: "refuse" raises UsageError for a run id that comes twice; "skip" keeps the first.
        progress: Whether to show a progress bar.
        verified: Files whose runs the caller has read already, with their `stamp_of` from before; they are not decoded
            again as long as the stamp is the same.

    Raises:
        UsageError: There is nothing to merge, or a duplicate.
        FileFault: A file that is unsound, or that changes meanwhile.
    """
    files = trajectory_files(paths)
    if not files:
        raise UsageError("nothing to merge: name at least one trajectory file or gather folder")
    skipped: list[str] = []
    sources: dict[str, Path] = {}
    with written_whole(Path(out)) as part:
        with new_file(part) as runs:
            for path in tqdm(files, desc="merging", unit="file", disable=not progress):
                known = path in verified and verified[path] == stamp_of(path)
                skipped += _copy_all(path, runs, sources, on_duplicate, known)
        _compare(part, sources)
    return MergeSummary(Path(out), len(sources), len(files), tuple(skipped), Path(out).stat().st_size)


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file that is there."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _copy_all(path: Path, runs: NewRuns, sources: dict[str, Path], on_duplicate: OnDuplicate, known: bool) -> list[str]:
    """Copy a file's runs, and note in `sources` where each came from. Returns the ids of duplicates."""
    skipped = []
    with open_trajectories(path) as source:
        for run_id in source.run_ids:
            if run_id in sources:
                if on_duplicate == "refuse":
                    raise UsageError(
                        f"run {run_id}: is in {sources[run_id]} and in {path}: leave one of them out, or skip "
                        "duplicates (--on-duplicate skip)"
                    )
                skipped.append(run_id)
                continue
            if not known:
                source.read(run_id)
            runs.copy(source, run_id)
            sources[run_id] = path
    return skipped


def _compare(part: Path, sources: Mapping[str, Path]) -> None:
    """Check that each copy holds the same bytes as its source, which has been verified."""
    with h5py.File(part) as copies:
        for run_id, path in sources.items():
            with h5py.File(path, locking="best-effort") as source:
                if list(_stored(source, run_id)) != list(_stored(copies, run_id)):
                    cure = "merge again when nothing writes the file, and check the disk"
                    raise FileFault(f"{path}: run {run_id}: differs from its copy: {cure}")


def _stored(file: h5py.File, run_id: str) -> Iterator[Any]:
    """A run as it is stored: its checksum, and each field's name, shape, type and compressed bytes."""
    run = file["runs"][run_id]
    yield run.attrs["sha256"]
    for name in sorted(run):
        dataset = run[name].id
        yield name, dataset.shape, dataset.dtype, dataset.read_direct_chunk((0,) * dataset.rank)

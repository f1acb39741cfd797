"""Which runs a predictor is trained on, which are for validation and test, and which are held out of everything.

Whole runs are split, never windows: neighbouring windows overlap, so that a test on them would test memory.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

from predictor.errors import FileFault, UsageError
from predictor.training.dataset import RunWindows

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@dataclass(frozen=True)
class Split:
    """Indices of runs. Every run is in exactly one part."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    """They choose the epoch and the threshold."""
    test: tuple[int, ...]
    """Looked at once, at the end."""


@dataclass(frozen=True)
class HeldOut:
    """Families and sources on which a predictor is evaluated, and on whose runs it is never trained."""

    families: tuple[str, ...] = ()
    """Kinds of architecture, as workloads name them."""
    sources: tuple[str, ...] = ()
    """Data sets. A name also means what is made of it: "fashion" means fashion-first, fashion@14 and fashion:x too."""

    def holds(self, family: str, source: str) -> bool:
        """Whether a run of this family on this source is held out."""
        return bool(self.among([family], [source]))

    def among(self, families: Iterable[str], sources: Iterable[str]) -> list[str]:
        """Those of the families and sources that are held out."""
        held_families = [family for family in families if family in self.families]
        return held_families + [source for source in sources if any(_made_of(source, name) for name in self.sources)]


def read_held_out(path: Path) -> HeldOut:
    """The families and sources that a TOML file names. Raises FileFault for a file that names none."""
    cure = "give a file like data/dataset/held_out.toml, or `none` to hold nothing out"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error}): {cure}") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise FileFault(f"{path}: no TOML ({error}): {cure}") from error
    known = [field.name for field in fields(HeldOut)]
    # A misspelt key would hold nothing out without a message.
    if surplus := sorted(set(content) - set(known)):
        raise FileFault(f"{path}: {', '.join(surplus)} means nothing here, only {' and '.join(known)} do: {cure}")
    for name, value in content.items():
        if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
            raise FileFault(f"{path}: {name} = {value!r:.60} is no list of names: {cure}")
    if not any(content.values()):
        raise FileFault(f"{path}: names no family and no source: {cure}")
    return HeldOut(**{name: tuple(value) for name, value in content.items()})


def split_by_run(runs: Sequence[RunWindows], validation: float, test: float, seed: int) -> Split:
    """Split runs, stratified by family: each family gives its share to every part, to within one run.

    The split depends on the runs' ids and families and on `seed`, not on the runs' order. Raises UsageError if the
    shares are out of range, and for fewer than three runs.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise UsageError(
            f"--validation {validation}, --test {test}: give shares above 0 that leave some runs for training"
        )
    if len(runs) < 3:
        raise UsageError(
            f"{len(runs)} run(s): training, validation and test need one each; gather more with "
            "`python -m collect gather trajectories`"
        )
    draw = random.Random(seed)
    rest = _by_family(runs, draw)
    for_test = _spread(rest, min(max(1, round(test * len(runs))), len(runs) - 2), draw)
    rest = [index for index in rest if index not in for_test]
    for_validation = _spread(rest, min(max(1, round(validation * len(runs))), len(rest) - 1), draw)
    for_training = [index for index in rest if index not in for_validation]
    return Split(tuple(sorted(for_training)), tuple(sorted(for_validation)), tuple(sorted(for_test)))


def family_folds(runs: Sequence[RunWindows], most: int, seed: int) -> list[tuple[str, ...]]:
    """The families in at most `most` groups of similar size, for cross-validation over unseen families.

    Raises UsageError if all runs are of one family.
    """
    families = families_of(runs)
    if len(families) < 2:
        raise UsageError(f"all runs are of the family {families}: leaving one family out needs at least two")
    random.Random(seed).shuffle(families)
    folds = min(most, len(families))
    return [tuple(sorted(families[fold::folds])) for fold in range(folds)]


def families_of(runs: Sequence[RunWindows]) -> list[str]:
    """The families of the runs, in alphabetical order."""
    return sorted({run.family for run in runs})


def runs_of(runs: Sequence[RunWindows], families: Sequence[str]) -> tuple[int, ...]:
    """The indices of the runs that belong to `families`."""
    return tuple(index for index, run in enumerate(runs) if run.family in families)


def _made_of(source: str, name: str) -> bool:
    """Whether a source has this name, or begins with it and a sign such as `-`, `@` or `:`."""
    return source.startswith(name) and not source[len(name) :][:1].isalnum()


def _by_family(runs: Sequence[RunWindows], draw: random.Random) -> list[int]:
    """Indices of all runs, one family after the other, in a random order."""
    indices = sorted(range(len(runs)), key=lambda index: runs[index].run_id)
    draw.shuffle(indices)
    families = families_of(runs)
    draw.shuffle(families)
    return sorted(indices, key=lambda index: families.index(runs[index].family))


def _spread(indices: Sequence[int], count: int, draw: random.Random) -> set[int]:
    """`count` of the indices at equal distances (a systematic sample), which spreads them over the families."""
    start = draw.random()
    return {indices[int((taken + start) * len(indices) / count)] for taken in range(count)}

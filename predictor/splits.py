"""Which runs a predictor learns from, which choose, and which are kept for the test.

Never single windows: neighbours of a run overlap, so that a test on them would ask for what was learnt by heart.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from predictor.errors import UsageError
from predictor.windows import RunWindows


@dataclass(frozen=True)
class Split:
    """Places of runs; every run is in exactly one part."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    """They choose the epoch and the threshold."""
    test: tuple[int, ...]
    """Looked at once, at the end."""


def split_by_run(runs: Sequence[RunWindows], validation: float, test: float, seed: int) -> Split:
    """Split runs, stratified by family: each family gives its share to every part, to within one run.

    The split depends on the runs' ids and families and on `seed`, not on the runs' order.
    Raises UsageError when the shares are out of range or there are fewer than three runs.
    """
    if min(validation, test) <= 0 or validation + test >= 1:
        raise UsageError(f"validation={validation}, test={test}: shares above 0 that leave some runs for training")
    if len(runs) < 3:
        raise UsageError(
            f"{len(runs)} run(s): training, validation and test need one each; gather more with "
            "`python -m collect gather trajectories`"
        )
    draw = random.Random(seed)
    rest = _by_family(runs, draw)
    test_places = _spread(rest, min(max(1, round(test * len(runs))), len(runs) - 2), draw)
    rest = [place for place in rest if place not in test_places]
    validation_places = _spread(rest, min(max(1, round(validation * len(runs))), len(rest) - 1), draw)
    train_places = [place for place in rest if place not in validation_places]
    return Split(tuple(sorted(train_places)), tuple(sorted(validation_places)), tuple(sorted(test_places)))


def family_folds(runs: Sequence[RunWindows], most: int, seed: int) -> list[tuple[str, ...]]:
    """The families in at most `most` groups of similar size, for cross-validation over families never seen.

    Raises UsageError when all runs are of one family.
    """
    families = sorted({run.family for run in runs})
    if len(families) < 2:
        raise UsageError(f"all runs are of the family {families}: leaving one family out needs at least two")
    random.Random(seed).shuffle(families)
    folds = min(most, len(families))
    return [tuple(sorted(families[fold::folds])) for fold in range(folds)]


def places_of(runs: Sequence[RunWindows], families: Sequence[str]) -> tuple[int, ...]:
    """The places of the runs that belong to `families`."""
    return tuple(place for place, run in enumerate(runs) if run.family in families)


def _by_family(runs: Sequence[RunWindows], draw: random.Random) -> list[int]:
    """Places of all runs, families one after the other, in an order that `draw` decides."""
    places = sorted(range(len(runs)), key=lambda place: runs[place].run_id)
    draw.shuffle(places)
    families = sorted({run.family for run in runs})
    draw.shuffle(families)
    return sorted(places, key=lambda place: families.index(runs[place].family))


def _spread(places: Sequence[int], count: int, draw: random.Random) -> set[int]:
    """`count` of the places at equal distances (a systematic sample), which spreads them over the families."""
    start = draw.random()
    return {places[int((taken + start) * len(places) / count)] for taken in range(count)}

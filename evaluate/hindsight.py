"""What a search found to be the best freezing of a workload, as a file: its schedules, their front, and reading it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor.errors import FileFault


@dataclass(frozen=True)
class Schedule:
    """A schedule that a search tried, beside full training: means over the seeds."""

    flops_share: float
    """Its FLOPs over those of full training."""
    difference: float
    """Its accuracy less that of full training, a share of 1."""
    accuracy: float
    fronts: tuple[tuple[float, float], ...]
    """The option `fronts` of the policy "schedule"; empty: nothing freezes."""


@dataclass(frozen=True)
class Oracle:
    """The front of a workload's schedules, cheapest first.

    It is the best of many on the test set, so part of its accuracy is luck that another seed would not repeat: an
    upper limit of what freezing could save, not a rival.
    """

    workload: str
    recipe: Mapping[str, Any]
    """What was trained; an oracle of another recipe says nothing."""
    source: str
    seeds: tuple[int, ...]
    tried: int
    """Different schedules that it is the best of."""
    front: tuple[Schedule, ...]


def pareto(schedules: list[Schedule]) -> list[Schedule]:
    """Those that no other matches in FLOPs and accuracy and beats in one of them, cheapest first."""
    front: list[Schedule] = []
    for each in sorted(schedules, key=lambda each: (each.flops_share, -each.difference)):
        if not front or each.difference > front[-1].difference:
            front.append(each)
    return front


def read_oracle(path: Path) -> Oracle:
    """Read what `python -m evaluate oracle` wrote. Raises FileFault for a file that is nothing of the kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Oracle(
            workload=str(content["workload"]),
            recipe=dict(content["recipe"]),
            source=str(content["source"]),
            seeds=tuple(int(seed) for seed in content["seeds"]),
            tried=int(content["tried"]),
            front=tuple(_schedule(each) for each in content["front"]),
        )
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFault(f"{path}: not an oracle ({error}): run `python -m evaluate oracle` again") from error


def _schedule(row: Any) -> Schedule:
    return Schedule(
        flops_share=float(row["flops_share"]),
        difference=float(row["difference"]),
        accuracy=float(row["accuracy"]),
        fronts=tuple((float(progress), float(share)) for progress, share in row["fronts"]),
    )

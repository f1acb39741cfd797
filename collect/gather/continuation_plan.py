"""The continuations of a run: from which steps, and with which layers frozen. Imports no torch."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from predictor.errors import UsageError


@dataclass(frozen=True)
class Choices:
    """Which continuations a run has. Another choice adds to the outcomes that there are."""

    points: tuple[float, ...] = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
    """Progress of the run, from 0 to below 1, at the steps to continue from."""
    prefixes: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75, 1.0)
    """Shares of the layers that are frozen as a prefix, at least one layer. The smallest is the first layer alone: what
    freezing it does does not follow from what freezing a quarter does."""
    singles: int = 2
    """Layers that are each frozen alone. The run's seed draws them, once for all points."""

    def __post_init__(self) -> None:
        if not self.points or not all(0 <= point < 1 for point in self.points):
            raise UsageError(f"points={_text(self.points)}: give at least one, each from 0 to below 1")
        if not all(0 < share <= 1 for share in self.prefixes):
            raise UsageError(f"prefixes={_text(self.prefixes)}: give shares of the layers, each above 0 and up to 1")
        if self.singles < 0:
            raise UsageError(f"singles={self.singles}: give a number of layers, from 0")

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON, with the keys that outcome files have."""
        return {"points": list(self.points), "fronts": list(self.prefixes), "singles": self.singles}

    @classmethod
    def from_dict(cls, choices: Mapping[str, Any]) -> "Choices":
        """The choices that `as_dict` returned."""
        return cls(tuple(choices["points"]), tuple(choices["fronts"]), choices["singles"])


@dataclass(frozen=True)
class Continuation:
    """A training from one step of a run to its end."""

    kind: str
    """One of `data.outcomes.records.KINDS`."""
    step: int = 0
    """Optimizer steps that the run itself has done."""
    layers: tuple[int, ...] = ()
    """Indices of the layers that are frozen from there on, rising."""

    @property
    def key(self) -> tuple[int, str, tuple[int, ...]]:
        """What makes it different from the others of its run."""
        return self.step, self.kind, self.layers


def planned(choices: Choices, total_steps: int, layer_count: int, seed: int) -> tuple[Continuation, ...]:
    """The run itself, and then its continuations step by step. Shares that mean the same layers give one continuation.

    Args:
        choices: Which continuations there are.
        total_steps: Optimizer steps of the run.
        layer_count: Layers of the run's network that may freeze.
        seed: The run's seed.
    """
    steps = sorted({min(round(point * total_steps), total_steps - 1) for point in choices.points})
    prefixes = sorted({max(1, round(share * layer_count)) for share in choices.prefixes})
    # The first layer alone is a prefix.
    others = [index for index in range(layer_count) if index > 0 or 1 not in prefixes]
    singles = sorted(random.Random(seed).sample(others, min(choices.singles, len(others))))
    each: list[tuple[str, tuple[int, ...]]] = [
        ("noise", ()),
        *(("front", tuple(range(count))) for count in prefixes),
        *(("single", (index,)) for index in singles),
    ]
    return Continuation("unfrozen"), *(Continuation(kind, step, layers) for step in steps for kind, layers in each)


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)

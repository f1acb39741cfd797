"""Which continuations of a run there are: from which moments, and with which layers frozen."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from predictor.errors import UsageError


@dataclass(frozen=True)
class Choices:
    """From which moments a run goes on again, and what is frozen then. What a run has, it does not lose."""

    points: tuple[float, ...] = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
    """Progress of the run at those moments, from 0 to below 1."""
    fronts: tuple[float, ...] = (0.01, 0.25, 0.5, 0.75, 1.0)
    """Shares of the layers that are frozen together, from the input on; at least one layer. The first layer alone is
    among them, for what it does cannot be told from what a quarter does."""
    singles: int = 2
    """Layers that are each frozen alone, drawn by the run's seed, the same ones at all points."""

    def __post_init__(self) -> None:
        if not self.points or not all(0 <= point < 1 for point in self.points):
            raise UsageError(f"points={_text(self.points)}: give at least one, each from 0 to below 1")
        if not all(0 < share <= 1 for share in self.fronts):
            raise UsageError(f"fronts={_text(self.fronts)}: give shares of the layers, each above 0 and up to 1")
        if self.singles < 0:
            raise UsageError(f"singles={self.singles}: give a number of layers, from 0")

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON can say them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, choices: dict[str, Any]) -> "Choices":
        """The choices that `as_dict` gave."""
        return cls(tuple(choices["points"]), tuple(choices["fronts"]), choices["singles"])


@dataclass(frozen=True)
class Continuation:
    """A training to be done, from one step of a run to its end."""

    kind: str
    """One of `data.outcomes.records.KINDS`."""
    step: int = 0
    """Optimizer steps that the run itself has done."""
    layers: tuple[int, ...] = ()
    """Places of the layers that are frozen from there on, rising."""

    @property
    def key(self) -> tuple[int, str, tuple[int, ...]]:
        """What tells it from the others of its run."""
        return self.step, self.kind, self.layers


def planned(choices: Choices, total_steps: int, layer_count: int, seed: int) -> tuple[Continuation, ...]:
    """The run itself, and then its continuations point by point, each but once where shares come to the same layers.

    total_steps: of the run. layer_count: its layers that may freeze. seed: the run's.
    """
    steps = sorted({min(round(point * total_steps), total_steps - 1) for point in choices.points})
    fronts = sorted({max(1, round(share * layer_count)) for share in choices.fronts})
    # The first layer alone is a front.
    others = [place for place in range(layer_count) if place > 0 or 1 not in fronts]
    singles = sorted(random.Random(seed).sample(others, min(choices.singles, len(others))))
    each: list[tuple[str, tuple[int, ...]]] = [
        ("noise", ()),
        *(("front", tuple(range(count))) for count in fronts),
        *(("single", (place,)) for place in singles),
    ]
    return Continuation("unfrozen"), *(Continuation(kind, step, layers) for step in steps for kind, layers in each)


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)

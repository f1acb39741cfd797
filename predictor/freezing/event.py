"""One change of the frozen set, as listeners are told of it and as it is kept."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FreezeEvent:
    """One change of the frozen set."""

    step: int
    """Optimizer steps done when it happened."""
    froze: tuple[int, ...]
    """Places of the layers that froze."""
    thawed: tuple[int, ...]
    """Places of the layers that train again."""
    frozen: tuple[int, ...]
    """Places of all layers frozen from here on."""
    layers: int
    """How many layers could be frozen."""

    def __str__(self) -> str:
        parts = [
            f"{word} {', '.join(map(str, places))}"
            for word, places in (("froze", self.froze), ("thawed", self.thawed))
            if places
        ]
        return f"step {self.step}: {'; '.join(parts)} ({len(self.frozen)} of {self.layers} layers frozen)"

    def as_dict(self) -> dict[str, Any]:
        """Numbers and lists of them, for a state."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "FreezeEvent":
        """Of `as_dict`'s result."""
        parts: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in row.items()}
        return cls(**parts)

"""One change of the frozen set: what listeners receive and what a controller's history holds."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_KEY_ON_DISK = "thawed"
"""The key of `unfroze` in states and results: files of earlier versions have it."""


@dataclass(frozen=True)
class FreezeEvent:
    """One change of the frozen set. Layers are given by their indices, ascending."""

    step: int
    """Optimizer steps done when it happened."""
    froze: tuple[int, ...]
    """Layers that froze."""
    unfroze: tuple[int, ...]
    """Layers that train again."""
    frozen: tuple[int, ...]
    """All layers that are frozen from here on."""
    layers: int
    """How many layers could be frozen."""

    @property
    def thawed(self) -> tuple[int, ...]:
        """Deprecated name of `unfroze`."""
        warnings.warn("FreezeEvent.thawed is now called unfroze", DeprecationWarning, stacklevel=2)
        return self.unfroze

    def __str__(self) -> str:
        changes = [
            f"{word} {', '.join(map(str, indices))}"
            for word, indices in (("froze", self.froze), ("unfroze", self.unfroze))
            if indices
        ]
        return f"step {self.step}: {'; '.join(changes)} ({len(self.frozen)} of {self.layers} layers frozen)"

    def as_dict(self) -> dict[str, Any]:
        """The event as numbers and lists of them, for a state or a results file."""
        row = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {_KEY_ON_DISK if name == "unfroze" else name: value for name, value in row.items()}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "FreezeEvent":
        """The event that `as_dict` wrote."""
        values: dict[str, Any] = {
            "unfroze" if name == _KEY_ON_DISK else name: tuple(value) if isinstance(value, list) else value
            for name, value in row.items()
        }
        return cls(**values)

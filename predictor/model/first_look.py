"""The figures of a look at the first batches: how large each layer's gradient is, and how far the batches agree."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FirstLook:
    """Norms of each layer's gradients over B batches, in evaluation mode and with no step taken.

    With g_b the gradient of batch b, `mean` is the sum over b of g_b, over B; `noise` is the same with every other
    batch's sign turned, so that what the batches agree on cancels.
    """

    batches: int
    """B."""
    mean_l1_L: tuple[float, ...]
    """Sum of the absolute values of the mean gradient."""
    noise_l1_L: tuple[float, ...]
    """The same of the noise."""
    mean_l2_L: tuple[float, ...]
    """Euclidean norm of the mean gradient."""
    noise_l2_L: tuple[float, ...]
    """The same of the noise."""
    weight_l1_L: tuple[float, ...]
    """Sum of the absolute values of the weights."""
    weight_l2_L: tuple[float, ...]
    """Euclidean norm of the weights."""
    size_L: tuple[int, ...]
    """Number of weights."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> "FirstLook":
        """The figures that `as_dict` returned."""
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in figures.items()}
        return cls(**read)

    @property
    def signal_L(self) -> tuple[float, ...]:
        """The L1 norm of the mean gradient less that of the noise, at least 0: what all batches ask of a layer."""
        return tuple(max(0.0, mean - noise) for mean, noise in zip(self.mean_l1_L, self.noise_l1_L, strict=True))

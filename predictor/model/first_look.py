"""The figures of a look at the first batches: how large each layer's gradient is, and how far the batches agree."""

import math
from dataclasses import asdict, dataclass
from typing import Any

LEARNED = 3.0
"""Evidence from which on a layer has learned something. Of random ones hardly one in a hundred has more."""


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
    evidence_L: tuple[float, ...] = ()
    """How far the weights are from independent random numbers, in standard deviations of such, at least 0
    (`predictor.policies.measuring.learned`). Empty if it was not measured."""
    unready_L: tuple[bool, ...] = ()
    """Whether a layer is of no use with random weights (`predictor.policies.measuring.unready`). Empty if it
    was not looked at."""

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

    @property
    def early_share(self) -> float:
        """How much more than their share of the gradient the first tenth of the layers have, at least one layer.

        1 where they have what falls to them by their number. Layers without a gradient, as those that the user holds
        still, do not count; infinite where no other is left.
        """
        trained = [mean for mean in self.mean_l1_L if mean > 0]
        if not trained:
            return math.inf
        count = max(1, round(len(trained) / 10))
        return sum(trained[:count]) / sum(trained) * len(trained) / count

    @property
    def from_scratch(self) -> bool:
        """Whether nearly no layer has learned anything: of ten at most one, since chance may look like learning."""
        learned = sum(evidence >= LEARNED for evidence in self.evidence_L)
        return bool(self.evidence_L) and 10 * learned <= len(self.evidence_L)

    @property
    def ready(self) -> int:
        """How many layers from the first on are of use with random weights."""
        return self.unready_L.index(True) if True in self.unready_L else len(self.unready_L)

    @property
    def learned(self) -> int:
        """How many layers from the first on have learned something, such as pretrained ones: 0 from scratch.

        It ends before two layers in succession whose weights cannot be told from random numbers: a single one may be
        depthwise, with too few weights to tell. A first layer must be told, as it may have been replaced.
        """
        if not self.evidence_L:
            return 0
        trains_L = [signal > 0 for signal in self.mean_l1_L]  # what the user holds still stays as it is
        doubt_L = [trains and evidence < LEARNED for trains, evidence in zip(trains_L, self.evidence_L, strict=True)]
        for layer, doubt in enumerate(doubt_L):
            if doubt and (layer == 0 or doubt_L[layer - 1]):
                return max(0, layer - 1)
        return len(doubt_L)

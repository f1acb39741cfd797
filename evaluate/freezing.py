"""The hooks of a trial that freeze layers and keep the frozen front's features, and what they note of that."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from collect.train import Hook, Training
from predictor.freezing.cache import FeatureCache
from predictor.freezing.controller import FreezeController
from predictor.freezing.layers import Layer
from predictor.policies.base import FreezePolicy


class FreezeHook(Hook):
    """Lets a policy freeze layers of the model under training.

    layers: those that may freeze; the training's own by default.
    """

    controller: FreezeController

    def __init__(self, policy: FreezePolicy, layers: Sequence[Layer] | None = None) -> None:
        self._policy = policy
        self._layers = layers

    def on_start(self, training: Training) -> None:
        """Watch the training; a policy that freezes before the first step does so here."""
        self.controller = FreezeController(
            training.model,
            training.optimizer,
            self._policy,
            total_steps=training.total_steps,
            layers=training.layers if self._layers is None else self._layers,
            say=None,
        )

    def on_step(self, training: Training) -> None:
        """Let the policy judge."""
        self.controller.step()

    def on_end(self, training: Training) -> None:
        """Let go of what the policy holds."""
        self.controller.close()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the controller's state."""
        self.controller.load_state_dict(state)


class CacheHook(Hook):
    """Skips the frozen front's forward pass on samples whose features are kept. To come after the FreezeHook.

    When a training goes on from a checkpoint, its features are kept anew; the counts go on.
    """

    cache: FeatureCache

    def __init__(self, freezing: FreezeHook) -> None:
        self.hits: Counter[tuple[frozenset[int], frozenset[int]]] = Counter()
        """Batches on which the front was skipped, in steps that were taken: by the layers frozen then, and those frozen
        when the place was found from whose features the pass began (`FeatureCache.taken`)."""
        self.misses = 0
        """Batches in such steps that the model ran as a whole."""
        self._freezing = freezing
        self._under_way: list[tuple[frozenset[int], frozenset[int]] | None] = []

    def on_start(self, training: Training) -> None:
        """Be there for each batch."""
        self.cache = FeatureCache(self._freezing.controller)
        training.around_forward = self._around

    def on_step(self, training: Training) -> None:
        """Count the step's batches."""
        self.hits.update(hit for hit in self._under_way if hit is not None)
        self.misses += self._under_way.count(None)
        self._under_way.clear()

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        hits = [[sorted(frozen), sorted(under), count] for (frozen, under), count in self.hits.items()]
        return {"hits": hits, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts."""
        self.hits = Counter({(frozenset(frozen), frozenset(under)): n for frozen, under, n in state["hits"]})
        self.misses = state["misses"]

    @property
    def figures(self) -> dict[str, Any]:
        """What the trial's result says of the cache, at the end."""
        return {
            "hits": self.hits.total(),
            "misses": self.misses,
            "bytes": self.cache.bytes,
            "cut": self.cache.cut,
            "reason": self.cache.reason,
        }

    @contextmanager
    def _around(self, ids_B: Tensor) -> Iterator[None]:
        with self.cache.batch(ids_B):
            yield
        taken = self.cache.taken
        self._under_way.append(None if taken is None else (self._freezing.controller.frozen, taken))

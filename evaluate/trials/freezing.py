"""The hooks of a trial that freeze layers and keep the frozen prefix's features, and what they record of it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from collect.training.loop import Hook, Training
from predictor.cache.augmented import AugmentedCache
from predictor.cache.compression import Compression
from predictor.cache.feature_cache import FeatureCache
from predictor.controller import FreezeController
from predictor.errors import UsageError, unknown
from predictor.layers.layer import Layer
from predictor.policies.base import FreezePolicy

CacheForm: TypeAlias = Literal["exact", "compressed", "views", "first"]
"""How features are kept: a FeatureCache, without and with compression; an AugmentedCache with compression; and, to
compare with, the features of a sample's first pass for good."""
UNDER_AUGMENTATION: tuple[CacheForm, ...] = ("views", "first")
"""The forms for samples that are augmented at random. The others refuse them."""


class FreezeHook(Hook):
    """Lets a policy freeze layers of the model under training.

    layers: those that may freeze; the training's own by default. stop: end the training once all of them are frozen.
    """

    controller: FreezeController

    def __init__(self, policy: FreezePolicy, layers: Sequence[Layer] | None = None, stop: bool = False) -> None:
        self._policy = policy
        self._layers = layers
        self._stop = stop

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
        """Ask the policy, and carry its answer out."""
        self.controller.step()
        if self._stop and self.controller.finished:
            training.finish()

    def on_end(self, training: Training) -> None:
        """Release what the policy holds."""
        self.controller.close()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the controller's state."""
        self.controller.load_state_dict(state)


class LookHook(Hook):
    """Shows the first batches to a policy that wants to look at them. Put it after the CacheHook."""

    def __init__(self, freezing: FreezeHook) -> None:
        self._freezing = freezing

    def on_start(self, training: Training) -> None:
        """Have the policy look; the training's own first batches come again as they would have."""
        self._freezing.controller.look(training.batches(), lambda batch: training.loss_of(*batch[1:]))


class CacheHook(Hook):
    """Skips the frozen prefix's forward pass on samples whose features are kept. Put it after the FreezeHook.

    When a training goes on from a checkpoint, the counts go on. Features of the form "exact" are kept anew; those of
    the others, which no later pass would give again, are in the checkpoint.

    form: how features are kept. options: of the form's cache. Raises UsageError for a form that does not exist.
    """

    cache: FeatureCache

    def __init__(self, freezing: FreezeHook, form: CacheForm = "exact", **options: Any) -> None:
        if form not in get_args(CacheForm):
            raise unknown("form of the cache", form, get_args(CacheForm))
        self.hits: Counter[tuple[frozenset[int], frozenset[int]]] = Counter()
        """Samples for which the prefix was skipped, in steps that were taken. The key: the layers frozen then, and
        those frozen when the cut was found at which their pass began (`FeatureCache.taken`)."""
        self.misses = 0
        """Samples in such steps that the model ran as a whole."""
        self._looked = 0
        self._freezing = freezing
        self._form: CacheForm = form
        self._options = options
        self._under_way: list[tuple[frozenset[int], Counter[frozenset[int] | None]]] = []

    def on_start(self, training: Training) -> None:
        """Hook into each batch. Raises UsageError where the form does not fit the training's samples."""
        self.cache = _made(self._form, self._freezing.controller, training, self._options)
        training.around_forward = self._around

    def on_step(self, training: Training) -> None:
        """Count the samples of the step's batches."""
        for frozen, taken in self._under_way:
            self.misses += taken.pop(None, 0)
            self.hits.update({(frozen, under): count for under, count in taken.items() if under is not None})
        self._under_way.clear()

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the features where they could not be kept anew."""
        hits = [[sorted(frozen), sorted(under), count] for (frozen, under), count in self.hits.items()]
        counts = {"hits": hits, "misses": self.misses, "looked": self.looked}
        return counts if self._form == "exact" else {**counts, "cache": self.cache.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts, and from the features where there are any."""
        self.hits = Counter({(frozenset(frozen), frozenset(under)): n for frozen, under, n in state["hits"]})
        self.misses, self._looked = state["misses"], state["looked"]
        if "cache" in state:
            self.cache.load_state_dict(state["cache"])

    @property
    def looked(self) -> int:
        """Samples in the passes forward in which the cache looked for cuts, besides the steps' own."""
        return self._looked + self.cache.looked

    @property
    def figures(self) -> dict[str, Any]:
        """What the trial's result says of the cache, at the end."""
        figures: dict[str, Any] = {
            "hits": self.hits.total(),
            "misses": self.misses,
            "looked": self.looked,
            "bytes": self.cache.bytes,
            "cut": self.cache.cut,
            "reason": self.cache.reason,
        }
        if self._form == "exact":
            return figures
        kept = {"precision": self.cache.precision, "exact_bytes": self.cache.exact_bytes}
        return {**figures, "form": self._form, **kept}

    @contextmanager
    def _around(self, ids_B: Tensor) -> Iterator[None]:
        with self.cache.batch(ids_B):
            yield
        self._under_way.append((self._freezing.controller.frozen, self.cache.taken))


def _made(form: CacheForm, controller: FreezeController, training: Training, options: dict[str, Any]) -> FeatureCache:
    if training.recipe.augment and form not in UNDER_AUGMENTATION:
        raise UsageError(
            f"the cache's form {form!r} wants the same samples in each epoch, and random augmentation changes them: "
            f"take one of {', '.join(UNDER_AUGMENTATION)}"
        )
    options = {"adaptive": False, **options}  # what a trial gives does not hang on how fast its machine is
    if form == "exact":
        return FeatureCache(controller, **options)
    if form == "compressed":
        return FeatureCache(controller, **{"compression": Compression(), **options})
    if form == "first":
        return FeatureCache(controller, **{"check_inputs": False, **options})
    return AugmentedCache(controller, **{"compression": Compression(), "seed": training.seed, **options})

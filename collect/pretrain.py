"""Pretrains the networks whose weights ship with the checkout; the `-transfer` workloads start from them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from collect.training.loop import Hook, Training, train
from collect.workloads.recipe import Workload
from collect.workloads.transfer import TRANSFERS, WEIGHTS, first, weights_of
from data.sources import Source, load_source
from predictor.errors import UsageError, unknown
from predictor.shared.files import written_whole

_SEED = 0
_CARD = "smartfrz"
"""The key of the safetensors metadata that describes how the weights were made."""


def pretrain(
    folder: Path = WEIGHTS, names: Sequence[str] = (), *, device: str = "auto", budget: float = 1.0
) -> dict[str, Training]:
    """Train networks of the table in `collect.workloads.transfer`, and write a safetensors file for each.

    On a CPU the same call gives the same weights, with the same versions and number of threads. All data are loaded
    before the first training, so that missing data are an error at once.

    Args:
        folder: Where the files go.
        names: Which networks; by default all.
        device: "auto", "cpu", "cuda", ...
        budget: The share of the recipe's steps to take.

    Returns:
        The trainings by name.

    Raises:
        UsageError: An unknown name, or settings that cannot work.
        FileFault: Missing data, or a file that cannot be written.
    """
    for name in names:
        if name not in TRANSFERS:
            raise unknown("pretrained network", name, TRANSFERS)
    sources = {name: _source_of(first(name)) for name in names or TRANSFERS}
    return {name: _one(name, source, weights_of(name, folder), device, budget) for name, source in sources.items()}


class _Log(Hook):
    """Prints a line after each epoch."""

    def on_epoch(self, training: Training) -> None:
        row = training.curve[-1]
        print(
            f"{training.workload.name}: step {training.step} of {training.total_steps}: "
            f"{row['test_accuracy']:.1%} of the test samples right, {row['train_seconds']:.0f} s",
            flush=True,
        )


def _source_of(workload: Workload) -> Source:
    return load_source(workload.source, train_samples=workload.recipe.train_samples)


def _one(name: str, source: Source, path: Path, device: str, budget: float) -> Training:
    training = train(first(name), seed=_SEED, hooks=[_Log()], device=device, budget=budget, source=source)
    if training.status != "finished":
        raise UsageError(f"{name}: the training {training.status}, and nothing is written: train on another device")
    _save(path, training, half=TRANSFERS[name].half)
    print(f"{path}: {training.curve[-1]['test_accuracy']:.1%} of the test samples of its own classes are right")
    return training


def _save(path: Path, training: Training, half: bool) -> None:
    from safetensors.torch import save

    made = {
        "workload": training.workload.name,
        "source": training.source.name,
        "seed": training.seed,
        "steps": training.total_steps,
        "recipe": asdict(training.recipe),
        "test_accuracy": training.curve[-1]["test_accuracy"],
    }
    kept = {name: tensor.half() if half else tensor for name, tensor in training.model.state_dict().items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.items()}
    with written_whole(path) as part:
        part.write_bytes(save(tensors, {_CARD: json.dumps(made, sort_keys=True)}))

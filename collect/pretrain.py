"""Pretrains the network whose weights ship with the checkout, for `resnet20-transfer` to start from."""

import json
from dataclasses import asdict
from pathlib import Path

from collect.train import Hook, Training, train
from collect.workloads import load_workload
from collect.workloads.transfer import WEIGHTS
from predictor.errors import UsageError
from predictor.files import written_whole

_WORKLOAD = "resnet20-first"
_SEED = 0
_CARD = "smartfrz"
"""The key of the safetensors metadata under which stands how the weights were made."""


def pretrain(path: Path = WEIGHTS, *, device: str = "auto", budget: float = 1.0) -> Training:
    """Train `resnet20-first` and write its weights as safetensors, with how they were made in the metadata.

    device: "auto", "cpu", "cuda", ... budget: the share of the recipe's steps to take.

    On a CPU the same command gives the same weights, with the same versions and number of threads. Raises UsageError
    for settings that cannot work, FileFault when the file cannot be written.
    """
    training = train(load_workload(_WORKLOAD), seed=_SEED, hooks=[_Told()], device=device, budget=budget)
    if training.status != "finished":
        raise UsageError(f"the training {training.status}, and nothing is written: train on another device")
    _save(path, training)
    print(f"{path}: {training.curve[-1]['test_accuracy']:.1%} of the test images of its own classes are right")
    return training


class _Told(Hook):
    """Prints a line after each epoch."""

    def on_epoch(self, training: Training) -> None:
        row = training.curve[-1]
        print(
            f"step {training.step} of {training.total_steps}: {row['test_accuracy']:.1%} of the test images right, "
            f"{row['train_seconds']:.0f} s",
            flush=True,
        )


def _save(path: Path, training: Training) -> None:
    from safetensors.torch import save

    made = {
        "workload": _WORKLOAD,
        "source": training.source.name,
        "seed": _SEED,
        "steps": training.total_steps,
        "recipe": asdict(training.recipe),
        "test_accuracy": training.curve[-1]["test_accuracy"],
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in training.model.state_dict().items()}
    with written_whole(path) as part:
        part.write_bytes(save(tensors, {_CARD: json.dumps(made, sort_keys=True)}))

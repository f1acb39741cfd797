"""Whether a device gives what the CPU gives: the layers that each policy freezes, and the weights that are recorded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from collect.hooks.recorder import Recorder
from collect.training.loop import Training
from evaluate.gpu.checks import CheckFailed
from evaluate.gpu.subject import images, small_workload, train_with
from evaluate.trials.freezing import FreezeHook
from predictor.controller import FreezeController
from predictor.model.sampling import SampleSpec
from predictor.policies import POLICIES, make_policy

_SAMPLES, _SIZE = 128, 8
_TOLERANCE = 1e-3
"""The difference of a weight after some steps, over the largest weight, that is left to another order of additions."""


def frozen_sets(device: torch.device) -> str:
    """Every policy decides the same, step by step."""
    names = [name for name in POLICIES if name not in ("none", "shorter", "stopped")]
    epochs = 15 if device.type == "cuda" else 6  # what stands in for a GPU takes long
    events = 0
    with _exact():
        for name in names:
            here, there = (_history(name, place, epochs) for place in (torch.device("cpu"), device))
            if here != there:
                raise CheckFailed(f"{name}: {_first_difference(here, there)}")
            events += len(here)
    return f"{len(names)} policies, {events} changes of the frozen set, all as on the CPU"


def samples(device: torch.device) -> str:
    """The recorded weights: at the start to the bit, and later to rounding."""
    with _exact():
        here, there = (_recorded(place) for place in (torch.device("cpu"), device))
    if not torch.equal(here[0], there[0]):
        raise CheckFailed("the weights before the first step differ: other positions, or another start")
    difference = float((here - there).abs().max() / here.abs().max())
    figures = f"{len(here)} snapshots, the largest difference {difference:.1e} of the largest weight"
    if not difference <= _TOLERANCE:
        raise CheckFailed(f"{figures}; at most {_TOLERANCE:g} is rounding")
    return figures


@contextmanager
def _exact() -> Iterator[None]:
    """Products in full float32, and operators that always give the same."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def _training(device: torch.device, epochs: int) -> Training:
    workload = small_workload(epochs=epochs)
    return Training(workload, images(_SAMPLES, _SIZE), seed=0, device=device)


def _history(policy: str, device: torch.device, epochs: int) -> list[tuple[int, tuple[int, ...]]]:
    hook = FreezeHook(make_policy(policy))
    train_with(_training(device, epochs), [hook])
    return _events(hook.controller)


def _events(controller: FreezeController) -> list[tuple[int, tuple[int, ...]]]:
    return [(event.step, event.frozen) for event in controller.history]


def _first_difference(here: list[tuple[int, tuple[int, ...]]], there: list[tuple[int, tuple[int, ...]]]) -> str:
    for one, other in zip(here, there, strict=False):
        if one != other:
            return f"on the CPU step {one[0]} freezes {list(one[1])}, here step {other[0]} {list(other[1])}"
    return f"{len(here)} changes on the CPU, {len(there)} here"


def _recorded(device: torch.device) -> torch.Tensor:
    recorder = Recorder(SampleSpec())
    train_with(_training(device, 15), [recorder])
    return torch.from_numpy(recorder.fields()["weights_TLK"])

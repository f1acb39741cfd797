"""Whether a device gives what the CPU gives: the layers that each policy freezes, and the weights that are recorded."""

from functools import partial

import torch

from collect.hooks.recorder import Recorder
from collect.training.loop import Training
from evaluate.gpu.checks import CheckFailed
from evaluate.gpu.subject import Loop, batches, images, network, small_workload, train_with
from predictor.controller import FreezeController
from predictor.model.sampling import SampleSpec
from predictor.policies import POLICIES, make_policy

_SAMPLES, _SIZE = 128, 8
_TOLERANCE = 1e-3
"""The difference of a weight after some steps, over the largest weight, that is left to another order of additions."""


def frozen_sets(device: torch.device) -> str:
    """Every policy decides the same, step by step, in float64.

    In float32 the last digits, which depend on the order of additions, become another decision within 60 steps.
    """
    names = [name for name in POLICIES if name not in ("none", "shorter", "stopped")]
    steps = 60 if device.type == "cuda" else 24  # what stands in for a GPU takes long
    events = 0
    _be_exact()
    for name in names:
        here, there = (_history(name, place, steps) for place in (torch.device("cpu"), device))
        if here != there:
            raise CheckFailed(f"{name}: {_first_difference(here, there)}")
        events += len(here)
    return f"{len(names)} policies, {events} changes of the frozen set, all as on the CPU"


def samples(device: torch.device) -> str:
    """The recorded weights: at the start to the bit, and later to rounding."""
    _be_exact()
    here, there = (_recorded(place) for place in (torch.device("cpu"), device))
    if not torch.equal(here[0], there[0]):
        raise CheckFailed("the weights before the first step differ: other positions, or another start")
    difference = float((here - there).abs().max() / here.abs().max())
    figures = f"{len(here)} snapshots, the largest difference {difference:.1e} of the largest weight"
    if not difference <= _TOLERANCE:
        raise CheckFailed(f"{figures}; at most {_TOLERANCE:g} is rounding")
    return figures


def _be_exact() -> None:
    """Compute in full float32, with operators that always give the same. The process is the check's own."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _history(policy: str, device: torch.device, steps: int) -> list[tuple[int, tuple[int, ...]]]:
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    loop = Loop(network().double().to(device), sgd, make_policy(policy), total_steps=steps)
    ready = [(x.double(), labels) for x, labels in batches(device, 8)]
    for step in range(steps):
        loop.step(*ready[step % len(ready)])
    loop.controller.close()
    return _events(loop.controller)


def _events(controller: FreezeController) -> list[tuple[int, tuple[int, ...]]]:
    return [(event.step, event.frozen) for event in controller.history]


def _first_difference(here: list[tuple[int, tuple[int, ...]]], there: list[tuple[int, tuple[int, ...]]]) -> str:
    for one, other in zip(here, there, strict=False):
        if one != other:
            return f"on the CPU step {one[0]} freezes {list(one[1])}, here step {other[0]} {list(other[1])}"
    return f"{len(here)} changes on the CPU, {len(there)} here"


def _recorded(device: torch.device) -> torch.Tensor:
    recorder = Recorder(SampleSpec())
    workload = small_workload(epochs=2)  # few steps: differences of the last digits grow fast
    train_with(Training(workload, images(_SAMPLES, _SIZE), seed=0, device=device), [recorder])
    return torch.from_numpy(recorder.fields()["weights_TLK"])

"""How often the host waits for the device: never in a step without a decision, and at most twice in one with."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from collect.hooks.recorder import Recorder
from collect.training.loop import Training
from collect.training.state import CHECK_EVERY
from evaluate.gpu.checks import CheckFailed, CheckSkipped
from evaluate.gpu.devices import counts_waits, waits
from evaluate.gpu.subject import Loop, batches, images, network, small_workload, train_with
from evaluate.trials.freezing import FreezeHook
from predictor.model.sampling import SampleSpec
from predictor.policies import make_policy

_STEPS = 120
_WARM_UP = 3
"""Steps in which kernels are chosen and constants copied."""
_A_DECISION = 2
"""Waits that a step with a decision may have."""


def user_loop(device: torch.device) -> str:
    """A user's own loop under the shipped predictor."""
    _refuse_blind(device)
    policy = make_policy("smartfrz")
    loop = Loop(network().to(device), partial(torch.optim.SGD, lr=0.05, momentum=0.9), policy, total_steps=_STEPS)
    watch = _Watch(device)
    ready = batches(device, 8)
    for step in range(1, _STEPS + 1):
        with watch(step, policy.due(step, _STEPS)):
            loop.step(*ready[step % len(ready)])
    return watch.figures()


def gathering(device: torch.device) -> str:
    """The toolkit's own training with augmentation, recorder and shipped predictor."""
    _refuse_blind(device)
    policy, spec = make_policy("smartfrz"), SampleSpec()
    training = Training(small_workload(epochs=30), images(128, 8), seed=0, device=device)
    watch = _Watch(device)

    def around(step: int) -> AbstractContextManager[None]:
        total = training.total_steps
        due = policy.due(step, total) or spec.due(step, total) or step % CHECK_EVERY == 0
        return watch(step, due)

    train_with(training, [Recorder(spec), FreezeHook(policy)], around)
    return watch.figures()


class _Watch:
    """Notes the waits of each step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps = self._decisions = self._most = 0
        self._plain: Counter[str] = Counter()
        self._deciding: Counter[str] = Counter()

    @contextmanager
    def __call__(self, step: int, decides: bool) -> Iterator[None]:
        """A context for a step."""
        with waits(self._device) as places:
            yield
        if step <= _WARM_UP:
            return
        if decides:
            self._decisions += 1
            self._most = max(self._most, len(places))
            self._deciding.update(places)
        else:
            self._steps += 1
            self._plain.update(places)

    def figures(self) -> str:
        """What was found. Raises CheckFailed for too many waits."""
        text = f"{self._steps} steps without a decision: {self._plain.total()} waits{_listed(self._plain)}; "
        text += f"{self._decisions} with one: at most {self._most}{_listed(self._deciding)}"
        if self._plain or self._most > _A_DECISION:
            raise CheckFailed(text)
        return text


def _listed(places: Counter[str]) -> str:
    return f" ({', '.join(f'{count} at {place}' for place, count in places.most_common(3))})" if places else ""


def _refuse_blind(device: torch.device) -> None:
    if not counts_waits(device):
        raise CheckSkipped("needs a GPU, or the second device of the tests, which both count waits")

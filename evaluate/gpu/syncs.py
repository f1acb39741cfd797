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

_STEPS = 80
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
        with watch(step, _A_DECISION * policy.due(step, _STEPS)):
            loop.step(*ready[step % len(ready)])
    return watch.figures()


def gathering(device: torch.device) -> str:
    """The toolkit's own training with augmentation, recorder and shipped predictor."""
    _refuse_blind(device)
    policy, spec = make_policy("smartfrz"), SampleSpec()
    training = Training(small_workload(epochs=_STEPS // 4), images(128, 8), seed=0, device=device)
    watch = _Watch(device)

    def around(step: int) -> AbstractContextManager[None]:
        total = training.total_steps
        decides = policy.due(step, total) or spec.due(step, total)
        return watch(step, _A_DECISION * decides + (step % CHECK_EVERY == 0))  # the loop looks at its loss

    train_with(training, [Recorder(spec), FreezeHook(policy)], around)
    return watch.figures()


class _Watch:
    """Notes the waits of each step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: Counter[int] = Counter()
        self._places: dict[int, Counter[str]] = {}
        self._most: Counter[int] = Counter()

    @contextmanager
    def __call__(self, step: int, allowed: int) -> Iterator[None]:
        """A context for a step that may wait so often."""
        with waits(self._device) as places:
            yield
        if step > _WARM_UP:
            self._steps[allowed] += 1
            self._most[allowed] = max(self._most[allowed], len(places))
            self._places.setdefault(allowed, Counter()).update(places)

    def figures(self) -> str:
        """What was found. Raises CheckFailed for too many waits."""
        text = "; ".join(
            f"{steps} steps that may wait {allowed} times: at most {self._most[allowed]}"
            + _listed(self._places[allowed])
            for allowed, steps in sorted(self._steps.items())
        )
        if any(most > allowed for allowed, most in self._most.items()):
            raise CheckFailed(text)
        return text


def _listed(places: Counter[str]) -> str:
    return f" ({', '.join(f'{count} at {place}' for place, count in places.most_common(3))})" if places else ""


def _refuse_blind(device: torch.device) -> None:
    if not counts_waits(device):
        raise CheckSkipped("needs a GPU, or the second device of the tests, which both count waits")

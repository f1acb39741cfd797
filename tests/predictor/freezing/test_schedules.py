"""Learning-rate schedules beside freezing: each goes its way, and a training under it resumes where it stopped."""

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler

from predictor import FreezeController, make_policy

STEPS = 10

SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
    "multi-step": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [3, 7]),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, STEPS),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "warm-up, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 3)],
        [3],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
}


class Training:
    """SGD on two groups of parameters with learning rates of their own."""

    def __init__(self, model, make_schedule, policy):
        self.model, self.done, self.rates = model, 0, []
        groups = [{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": 0.05}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.schedule = make_schedule(self.optimizer)
        self.controller = FreezeController(model, self.optimizer, policy, total_steps=STEPS)
        self.parts = (self.model, self.optimizer, self.schedule, self.controller)

    def run(self, until):
        while self.done < until:
            torch.manual_seed(self.done)
            F.cross_entropy(self.model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3).backward()
            self.optimizer.step()
            self.controller.step()
            # A loss that does not fall.
            self.schedule.step(*([1.0] if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau) else []))
            self.optimizer.zero_grad()
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.done += 1
        return self


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of PyTorch 2.6's own SequentialLR
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_their_way_as_without_freezing(name, make_toy, tmp_path):
    def start(policy="linear", seed=0):
        return Training(make_toy(seed), SCHEDULES[name], make_policy(policy))

    unbroken = start().run(STEPS)
    assert [event.step for event in unbroken.controller.history] == [7, 9, 10]
    assert unbroken.rates == start("none").run(STEPS).rates
    assert unbroken.rates[0] != unbroken.rates[-1]
    first, resumed = start().run(8), start(seed=5)
    torch.save([part.state_dict() for part in first.parts], tmp_path / "checkpoint.pt")
    for part, state in zip(resumed.parts, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed.done = 8
    assert resumed.run(STEPS).rates == unbroken.rates[8:]
    there, here = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)

"""Every optimizer of torch goes on when a layer freezes and trains again, and begins with it as with a new one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from tests.predictor.scripted import Script

NAMES = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "RMSprop", "Rprop", "NAdam", "RAdam", "Adamax", "ASGD")
NEWER = tuple(name for name in ("Adafactor", "Muon") if hasattr(torch.optim, name))
FORMS = (
    *((name, {}) for name in NAMES + NEWER),
    *((name, {"foreach": True}) for name in NAMES),
    *((name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")),
)
X, Y = torch.linspace(-1, 1, 4 * 8).reshape(4, 8), torch.tensor([0, 1, 2, 0])


def made(name, parameters, **options):
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    return getattr(torch.optim, name)(parameters, lr=0.05, **momentum, **options)


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)), nn.Linear(8, 3, bias=False))


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_a_layer_trains_again(name, options):
    model = net()
    optimizer = made(name, model.parameters(), **options)
    controller = FreezeController(model, optimizer, Script({0: {0}, 2: {0, 1, 2}, 4: {2}, 6: ()}), total_steps=9)
    for step in range(9):
        before = [parameter.clone() for parameter in model.parameters()]
        frozen = controller.frozen
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        moved = {index for index, p in enumerate(model.parameters()) if not torch.equal(p, before[index])}
        assert moved == set(range(4)) - frozen, step
        controller.step()
        optimizer.zero_grad()


def test_fused_momentum_begins_again_as_the_plain_one_does():
    def train(**options):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
        controller = FreezeController(model, optimizer, Script({2: {0, 1}, 4: ()}), total_steps=9)
        for _ in range(9):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        return model

    for plain, fused in zip(train().parameters(), train(fused=True).parameters(), strict=True):
        torch.testing.assert_close(plain, fused)

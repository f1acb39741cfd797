"""Modes that change in the middle of an epoch, of modules that are held in a mode and of others: noticed at once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import predictor
from predictor import FeatureCache, FreezeController, make_policy
from tests.predictor.scripted import Script

SAMPLES, SIZE, AT = 24, 6, 13  # the second batch of the fourth epoch: nothing is due to be checked then
generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(SAMPLES, 4, generator=generator)
ROWS = ROWS[ROWS[:, 0].argsort()]
TARGET = ROWS.sum(1, keepdim=True)
LARGE = float(ROWS[-3, 0])


class Normed(nn.Module):
    """Held in evaluation mode, part by part."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x)))


class Scaled(nn.Module):
    """Keeps its mode: it does something else in evaluation mode, which only the last samples show."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        if self.training:
            return self.linear(x)
        return self.linear(torch.where(x[:, :1] >= LARGE, 3 * x, x))


class Stage(nn.Module):
    """Held in evaluation mode once both layers are frozen. In training it adds something to the last samples."""

    def __init__(self):
        super().__init__()
        self.linear, self.late, self.noise = nn.Linear(4, 4), nn.Linear(4, 8), 0.5

    def forward(self, x):
        if self.training:
            x = torch.where(x[:, :1] >= LARGE, x + self.noise, x)
        return self.late(self.linear(x))


def network(first):
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def frozen_by_the_user():
    model = network(Normed())
    model[0].requires_grad_(False)
    return model


def copy_of_a_held_one():
    model = network(Normed())
    FreezeController(model, torch.optim.SGD(model.parameters()), make_policy("static", layers=1), total_steps=9)
    other = copy.deepcopy(model)
    other.train()
    other[0].eval()
    return other


def losses(make, act, cached, policy=None):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    policy = policy or make_policy("static", layers=1)
    controller = FreezeController(model, optimizer, policy, total_steps=999, say=None)
    cache, found = FeatureCache(controller), []
    for step in range(24):
        if step == AT:
            act(model)
        torch.manual_seed(100 + step)
        ids = torch.arange(SAMPLES).split(SIZE)[step % 4]
        if cached:
            with cache.batch(ids):
                loss = mse_loss(model(ROWS[ids]), TARGET[ids])
        else:
            loss = mse_loss(model(ROWS[ids]), TARGET[ids])
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, cache


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "act"),
    [
        (lambda: network(Normed()), lambda model: setattr(model[0].norm, "training", True)),
        (lambda: network(Normed()), lambda model: setattr(model[0].drop, "training", True)),
        (lambda: network(Scaled()), lambda model: model[0].eval()),
        (frozen_by_the_user, predictor.release),
        (copy_of_a_held_one, lambda model: model.train()),
    ],
    ids=["a norm set", "dropout set", "one that keeps its mode", "released", "a copy"],
)
def test_losses_are_those_without_a_cache(make, act):
    expected, _ = losses(make, act, cached=False)
    found, cache = losses(make, act, cached=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert cache.hits >= AT - 4  # it worked before


@pytest.mark.filterwarnings("ignore")
def test_a_module_around_the_cut_that_reads_its_mode_is_held_later():
    def found(cached):
        policy = Script({0: {0}, AT: {0, 1}})
        return losses(lambda: network(Stage()), lambda model: None, cached, policy)

    assert found(cached=True)[0] == pytest.approx(found(cached=False)[0], rel=1e-4)


def as_lightning_does(model):
    """What Lightning does around a validation: it notes the modes, and sets them again one by one."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    for module, mode in before.items():
        module.training = mode


@pytest.mark.parametrize("act", [lambda model: model.eval() and model.train(), as_lightning_does])
def test_modes_that_change_nothing_cost_nothing(act):
    found, cache = losses(lambda: network(Normed()), act, cached=True)
    assert (cache.reason, cache.hits) == ("", 20)
    assert cache.checked < SAMPLES
    assert found == pytest.approx(losses(lambda: network(Normed()), lambda model: None, cached=False)[0], rel=1e-4)

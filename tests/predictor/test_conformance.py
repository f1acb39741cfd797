"""What holds for every policy, whatever it does."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController, FreezePolicy, make_policy
from predictor.policies import POLICIES

STEPS = 24
# Settings under which each policy freezes something in a short training (those that freeze at all).
OPTIONS = {
    "shorter": {"budget": 0.5},
    "stopped": {"budget": 0.5},
    "static": {"layers": 2},
    "linear": {"start": 0.25},
    "spfde": {"blocks": 3, "target": 0.9},
    "autofreeze": {"intervals": 6},
    "pipetransformer": {"epochs": 6},
    "greentrainer": {"rounds": 6},
    "slimfit": {"every": 4},
    "lisa": {"layers": 1, "every": 5},
    "grades": {"share": 2.0, "grace": 0.2, "every": 3},
    "autorgn": {"criterion": "snr", "threshold": 2.0, "rounds": 4, "batches": 2},
    "egeria": {"window": 2, "patience": 1, "tolerance": 0.5, "refresh": 3},
    "simfreeze": {"tolerance": 0.3, "patience": 2},
}
FREEZING = [name for name in POLICIES if name not in ("none", "shorter", "stopped")]


class Training:
    """A small real training, with momentum, BatchNorm and dropout, that can be saved and resumed."""

    def __init__(self, model, policy, optimizer="sgd"):
        self.model = model
        parameters = model.parameters()
        self.optimizer = (
            torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
            if optimizer == "sgd"
            else torch.optim.AdamW(parameters, lr=0.01)
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.controller = policy and FreezeController(model, self.optimizer, policy, total_steps=STEPS)
        self.done = 0

    def run(self, steps, watch=lambda training: None):
        for _ in range(steps):
            torch.manual_seed(1000 + self.done)
            x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
            self.model.train()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            if self.controller:
                self.controller.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.done += 1
            watch(self)
        return self

    def save(self, path):
        parts = (self.model, self.optimizer, self.schedule, self.controller)
        torch.save([part.state_dict() for part in parts] + [self.done], path)

    def load(self, path):
        *states, self.done = torch.load(path, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.schedule, self.controller), states, strict=True):
            part.load_state_dict(state)
        return self

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.fixture
def policy_of(make_predictor_file):
    def make(name):
        options = dict(OPTIONS.get(name, {}))
        if name == "smartfrz":
            options["predictor"] = make_predictor_file()
        return make_policy(name, **options)

    return make


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", POLICIES)
def test_frozen_layers_stand_still_with_their_statistics_and_the_head_trains(name, policy_of, make_toy):
    held = {}

    def watch(training):
        assert training.controller.frozen <= set(range(3))
        for index, layer in enumerate(training.controller.layers):
            now = [t.clone() for module in layer.modules for t in module.state_dict().values()]
            if index in training.controller.frozen:
                assert all(torch.equal(a, b) for a, b in zip(held.get(index, now), now, strict=True)), index
                held[index] = now
            else:
                held.pop(index, None)

    training = Training(make_toy(), policy_of(name))
    head = training.model.head.weight.detach().clone()
    training.run(STEPS, watch)
    assert bool(training.controller.history) == (name in FREEZING)
    assert not torch.equal(head, training.model.head.weight)
    assert training.model.head.weight.requires_grad


class Unusual(nn.Module):
    """Complex weights, weights without numbers, and a head that is defined first."""

    def __init__(self):
        super().__init__()
        self.head, self.inner = nn.Linear(8, 3), nn.Linear(8, 8, dtype=torch.complex64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is nothing to initialize
            self.empty = nn.Linear(0, 8)
        self.outer = nn.Linear(64, 8, dtype=torch.complex64)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.inner(self.outer(x.to(torch.complex64)) + self.empty(x[:, :0])).abs())


@pytest.mark.parametrize("name", POLICIES)
def test_weights_of_every_kind_train_without_an_error_or_a_warning(name, policy_of):
    training = Training(Unusual(), policy_of(name), "adamw").run(STEPS)
    assert training.model.head.weight.requires_grad


@pytest.mark.parametrize("name", [*POLICIES, "autorgn, rgn"])
def test_a_policy_that_was_used_before_begins_anew(name, policy_of, make_toy):
    used, unused = (make_policy("autorgn") if name == "autorgn, rgn" else policy_of(name) for _ in range(2))
    Training(make_toy(), used).run(STEPS).controller.close()
    again, fresh = (Training(make_toy(seed=5), policy).run(STEPS) for policy in (used, unused))
    assert again.controller.history == fresh.controller.history
    assert equal(again.weights(), fresh.weights())
    assert again.controller.policy.passes == fresh.controller.policy.passes


def with_two_optimizers(model, policy, body_first):
    """A training whose body has an optimizer and a falling rate of its own."""
    body, head = (torch.optim.SGD(part.parameters(), 0.05, momentum=0.9) for part in (model.body, model.head))
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(body, STEPS // 3)
    pair = [body, head] if body_first else [head, body]
    controller = FreezeController(model, pair, policy, total_steps=STEPS, say=None)
    for step in range(STEPS):
        torch.manual_seed(1000 + step)
        F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(3, (8,))).backward()
        for optimizer in pair:
            optimizer.step()
        controller.step()
        schedule.step()
        for optimizer in pair:
            optimizer.zero_grad()
    return controller.history, model.state_dict()


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_several_optimizers_does_not_matter(name, policy_of, make_toy):
    first, other = (with_two_optimizers(make_toy(), policy_of(name), body_first) for body_first in (True, False))
    assert first[0] == other[0]
    assert equal(first[1], other[1])


def gradients_of(training):
    return {name: None if p.grad is None else p.grad.clone() for name, p in training.model.named_parameters()}


def alike(first, second):
    """Whether nested dictionaries and lists hold the same numbers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == second


@pytest.mark.parametrize("name", POLICIES)
def test_deciding_changes_nothing(name, policy_of, make_toy):
    training = Training(make_toy(), policy_of(name)).run(STEPS // 2)
    F.cross_entropy(training.model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    weights, random = training.weights(), torch.get_rng_state()
    grads = gradients_of(training)
    state = copy.deepcopy(training.optimizer.state_dict())
    view = training.controller.view
    training.controller.policy.observe(view)
    training.controller.policy.decide(view)
    assert equal(weights, training.weights())
    assert torch.equal(random, torch.get_rng_state())
    assert alike(grads, gradients_of(training))
    assert alike(state, training.optimizer.state_dict())


def test_none_equals_no_controller_bit_for_bit(policy_of, make_toy):
    bare = Training(make_toy(), None).run(STEPS)
    watched = Training(make_toy(), policy_of("none")).run(STEPS)
    assert equal(bare.weights(), watched.weights())


RESUMED = [
    (name, *case)
    for name, kind in POLICIES.items()
    if kind.state_dict is not FreezePolicy.state_dict
    for case in ((1, "sgd"), (7, "adamw"), (13, "sgd"), (20, "adamw"))
]
"""Policies with a state of their own. All others resume alike."""


@pytest.mark.parametrize(("name", "stop", "optimizer"), [("linear", 13, "adamw"), ("lisa", 13, "sgd"), *RESUMED])
def test_save_load_go_on_equals_the_unbroken_run(name, stop, optimizer, policy_of, make_toy, tmp_path):
    unbroken = Training(make_toy(), policy_of(name), optimizer).run(STEPS)
    first = Training(make_toy(), policy_of(name), optimizer).run(stop)
    first.save(tmp_path / "checkpoint.pt")
    resumed = Training(make_toy(seed=5), policy_of(name), optimizer).load(tmp_path / "checkpoint.pt")
    assert resumed.controller.frozen == first.controller.frozen
    resumed.run(STEPS - stop)
    assert equal(unbroken.weights(), resumed.weights())
    assert resumed.controller.history == unbroken.controller.history
    assert resumed.controller.frozen == unbroken.controller.frozen


@pytest.mark.parametrize("name", POLICIES)
def test_the_users_default_device_changes_no_decision(name, policy_of, make_toy):
    seen = []
    for device in ("cpu", "meta"):  # a stand-in for "cuda", with which nothing on the CPU mixes
        torch.manual_seed(0)
        training = Training(make_toy(), policy_of(name))
        x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
        with torch.device(device):
            for _ in range(STEPS):
                F.cross_entropy(training.model(x), y).backward()
                training.optimizer.step()
                training.controller.step()
                training.optimizer.zero_grad()
        seen.append([event.as_dict() for event in training.controller.history])
    assert seen[0] == seen[1]

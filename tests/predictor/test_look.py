"""The first look: what a policy gets to see of the first batches, and that it leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from predictor import FreezeController, FreezePolicy
from predictor.errors import UsageError

X = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3
STEPS = 20


class Quiet(FreezePolicy):
    """Freezes the first layer before the first step where it gets a look, and notes what it is asked with."""

    wants_look = True

    def __init__(self, without=()):
        self.without, self.views, self.bound = frozenset(without), [], 0

    def bind(self, model, optimizer, layers):
        self.bound += 1

    def decide(self, view):
        self.views.append(view)
        if view.step == 0:
            return frozenset({0}) if view.look else self.without
        return view.frozen

    @property
    def looks(self):
        return [view.look for view in self.views if view.look is not None]


def loader_of(**options):
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 6, "shuffle": True, **options})


def start(model, policy=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"total_steps": STEPS, "say": None, **options}
    return optimizer, FreezeController(model, optimizer, policy or Quiet(), **options)


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def looked_at(model, controller, batches):
    """Look at batches with the model's own loss."""
    return controller.look(batches, loss_of(model))


def trained(model, optimizer, controller, loader):
    """Train an epoch. Returns the losses."""
    losses = []
    model.train()
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def drawn():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def seed_all():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)


def by_hand(model, layers, batches):
    """The L1 norms of the mean gradient and of the noise, for each layer."""
    model.eval()
    found = []
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found.append([torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in layers])
    sums = [[sum(g[index] * sign**b for b, g in enumerate(found)) for index in range(len(layers))] for sign in (1, -1)]
    return [[float(each.abs().sum()) / len(found) for each in kind] for kind in sums]


def test_the_policy_sees_the_norms_and_decides_before_the_first_step(make_toy):
    model = make_toy()
    batches = list(loader_of(shuffle=False))
    policy = Quiet()
    optimizer, controller = start(model, policy)
    assert (controller.frozen, policy.bound) == (set(), 1)
    event = looked_at(model, controller, batches)
    assert (event.step, event.froze, controller.frozen) == (0, (0,), {0})
    assert controller.history == [event]
    assert (policy.bound, controller.looked) == (2, pytest.approx(8 * 4 / 6))
    look = policy.looks[0]
    model_layers = start(copy := make_toy())[1].layers
    mean, noise = by_hand(copy, model_layers, [(x[:4], y[:4]) for x, y in batches])
    assert look.batches == 8
    assert look.mean_l1_L == pytest.approx(mean, rel=1e-4)
    assert look.noise_l1_L == pytest.approx(noise, rel=1e-4)
    trained(model, optimizer, controller, batches[:1])
    assert controller.view.look is None


def test_the_model_and_its_gradients_are_what_they_were(make_toy):
    model = make_toy()
    model.body[1].eval()
    model(X[:4]).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: hooks.append(p))
    _, controller = start(model, Quiet())
    controller.policy.decide = lambda view: frozenset()
    looked_at(model, controller, loader_of())
    assert controller.looked > 5
    assert hooks == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(then, p.grad) for then, p in zip(grads, model.parameters(), strict=True))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_draws_the_same_numbers_as_without_a_look(make_toy, own, workers):
    class Blind(Quiet):
        def decide(self, view):
            return frozenset()

    losses, after = [], []
    for looks in (False, True):
        model = make_toy()
        generator = torch.Generator().manual_seed(5) if own else None
        loader = loader_of(generator=generator, num_workers=workers)
        seed_all()
        optimizer, controller = start(model, Blind())
        if looks:
            looked_at(model, controller, loader)
            assert controller.looked > 5
        losses.append(trained(model, optimizer, controller, loader))
        after.append(drawn())
    assert losses[0] == losses[1]
    assert after[0] == after[1]


def test_the_look_is_at_the_batches_that_the_training_begins_with(make_toy):
    model, seen = make_toy(), []
    loader = loader_of()
    _, controller = start(model)

    def loss(batch):
        seen.append(batch[0].clone())
        return loss_of(model)(batch)

    controller.look(loader, loss)
    assert all(torch.equal(then, x[:4]) for then, (x, _) in zip(seen[-8:], loader, strict=True))
    assert all(torch.equal(then, seen[-8]) for then in seen[:-8])


def test_a_policy_that_wants_no_look_is_not_disturbed(make_toy):
    class Unopened:
        def __iter__(self):
            raise AssertionError("opened")

    policy = Quiet()
    policy.wants_look = False
    _, controller = start(make_toy(), policy)
    assert controller.look(Unopened(), print) is None
    assert (policy.bound, len(policy.views), controller.looked) == (1, 1, 0)


def test_a_training_that_has_begun_or_continues_keeps_what_it_decided(make_toy):
    model = make_toy()
    optimizer, controller = start(model)
    loader = loader_of()
    trained(model, optimizer, controller, [next(iter(loader))])
    assert looked_at(model, controller, loader) is None
    model = make_toy()
    _, resumed = start(model)
    resumed.load_state_dict(controller.state_dict())
    assert looked_at(model, resumed, loader) is None
    assert controller.looked == resumed.looked == 0


def test_a_second_look_replaces_the_first(make_toy):
    model = make_toy()
    policy = Quiet(without={1})
    _, controller = start(model, policy)
    assert controller.frozen == {1}
    first = looked_at(model, controller, loader_of(shuffle=False))
    second = looked_at(model, controller, loader_of(shuffle=False))
    assert first == second
    assert controller.history == [second]
    assert (controller.frozen, controller.looked) == ({0}, pytest.approx(16 * 4 / 6))
    assert policy.looks[0] == policy.looks[1]
    assert min(policy.looks[0].mean_l1_L) > 0  # also of what had been frozen without a look


@pytest.mark.parametrize("kind", ["one", "infinite", "shapes"])
def test_without_a_look_the_policy_decides_as_it_did(make_toy, kind):
    said = []
    model = make_toy()
    policy = Quiet(without={0, 1})
    _, controller = start(model, policy, say=said.append)
    scale = float("inf") if kind == "infinite" else 1.0
    batches = list(loader_of())[: 1 if kind == "one" else 8]
    if kind == "shapes":
        with pytest.raises(UsageError, match=r"\(4,\)"):
            controller.look(batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
    else:
        controller.look(batches, lambda batch: loss_of(model)(batch) * scale)
        assert len(said) == 1
    assert controller.frozen == {0, 1}
    assert policy.looks == []
    assert not controller.looked or controller.looked <= 8


@pytest.mark.parametrize("wrong", ["no function", "number", "detached"])
def test_losses_that_cannot_be_looked_at_are_refused(make_toy, wrong):
    model = make_toy()
    _, controller = start(model)
    loss = loss_of(model)
    given = {
        "no function": [loss(batch) for batch in loader_of()],
        "number": lambda batch: loss(batch).item(),
        "detached": lambda batch: loss(batch).detach(),
    }[wrong]
    with pytest.raises(UsageError, match=r"look\(\)"):
        controller.look(loader_of(), given)


def test_of_a_batch_a_quarter_is_looked_at(make_toy):
    model = make_toy()
    _, controller = start(model)
    sizes = []

    def loss(batch):
        sizes.append(len(batch[0]))
        return loss_of(model)(batch)

    controller.look(loader_of(batch_size=24), loss)
    assert set(sizes) == {6}
    assert controller.looked == 2 * 0.25


def test_where_a_part_does_not_do_whole_batches_are_looked_at(make_toy):
    model, made_for = make_toy(), 12
    policy = Quiet()
    _, controller = start(model, policy)

    def loss(batch):
        return loss_of(model)((batch[0].view(made_for, 1, 8, 8), batch[1]))

    batches = list(loader_of(batch_size=12))
    before = [x.clone() for x, _ in batches]
    controller.look(batches, loss)
    assert controller.looked == policy.looks[0].batches == 4
    assert all(torch.equal(then, x) for then, (x, _) in zip(before, batches, strict=True))
    made_for = 11
    with pytest.raises(RuntimeError):
        controller.look(batches, loss)


def test_what_is_done_to_a_part_is_not_done_to_the_batch(make_toy):
    model = make_toy()
    _, controller = start(model)
    batches = [{"x": x, "y": y} for x, y in loader_of(batch_size=24)]
    before = [batch["x"].clone() for batch in batches]
    controller.look(batches, lambda batch: loss_of(model)((batch.pop("x").mul_(2), batch.pop("y"))))
    assert controller.looked == 2 * 0.25
    assert all(torch.equal(then, batch["x"]) for then, batch in zip(before, batches, strict=True))


class TwoHeads(nn.Module):
    """Defines its heads first. In training it has two, which evaluation mixes."""

    def __init__(self):
        super().__init__()
        self.head, self.second_head, self.mix = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(6, 3)
        self.second, self.first = nn.Linear(8, 8), nn.Linear(64, 8)
        self.made_for = -1  # samples in a batch; -1 for any

    def forward(self, x):
        inner = self.first(x.reshape(self.made_for, 64))
        both = self.head(self.second(inner)), self.second_head(inner)
        return both if self.training else self.mix(torch.cat(both, 1))


@pytest.mark.parametrize("made_for", [-1, 6])
def test_layers_are_settled_by_the_first_pass_before_they_are_looked_at(made_for):
    torch.manual_seed(0)
    model = TwoHeads()
    model.made_for = made_for
    policy = Quiet(without={0})
    policy.wants_flops = True
    optimizer, controller = start(model, policy)
    assert [layer.name for layer in controller.layers] != ["first", "second"]
    looked_at(model, controller, loader_of())
    assert [layer.name for layer in controller.layers] == ["first", "second"]  # as in training
    assert policy.bound == 2
    assert len(policy.looks[0].size_L) == 2
    assert min(policy.looks[0].mean_l1_L) > 0
    assert policy.views[-1].flops is not None
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    # And the training's own first pass changes nothing.
    F.cross_entropy(model(X[:6])[0], Y[:6]).backward()
    optimizer.step()
    assert controller.step() is None
    assert controller.frozen == {0}


@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_that_waits_for_the_first_pass_counts_where_a_step_was_done(steps):
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer, controller = start(model, Quiet())
    looked_at(model, controller, loader_of())
    for _ in range(steps):
        F.cross_entropy(model(X[:4])[0], Y[:4]).backward()
        optimizer.step()
        controller.step()
    resumed = start(model := TwoHeads(), policy := Quiet())[1]
    resumed.load_state_dict(controller.state_dict())
    event = looked_at(model, resumed, loader_of())
    assert (event is None) == (steps == 1)
    assert len(policy.looks) == round(resumed.looked) / 5 == 1 - steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(X[:4])[0], Y[:4]).backward()
    optimizer.step()
    resumed.step()
    assert resumed.frozen == {0}
    assert resumed.view.step == steps + 1

"""The first look: what a policy gets to see of the first batches, and that it leaves no trace."""

import random
from functools import partial
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from predictor import FreezeController, FreezePolicy, SieveSampler
from predictor.errors import UsageError
from tests.predictor.wrapped_loaders import Wrapped, generated

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
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm2d)  # which have seen no data yet
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
    model, kept = make_toy(), SimpleQueue()  # a list would be brought back
    loader = loader_of()
    _, controller = start(model)

    def loss(batch):
        kept.put(batch[0].clone())
        return loss_of(model)(batch)

    controller.look(loader, loss)
    seen = [kept.get() for _ in range(kept.qsize())]
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
    sizes = SimpleQueue()

    def loss(batch):
        sizes.put(len(batch[0]))
        return loss_of(model)(batch)

    controller.look(loader_of(batch_size=24), loss)
    assert {sizes.get() for _ in range(sizes.qsize())} == {6}
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


class Centred(nn.Module):
    """A loss with a state, as DINO's."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.calls, self.log, self.sums = [model], 0, [], np.zeros(3)
        self.register_buffer("centre", torch.zeros(3))
        self.critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, batch):
        logits = self.inner[0](batch[0])
        self.calls += 1
        self.log.append(logits.detach())
        self.sums += 1
        self.centre.mul_(0.9).add_(logits.detach().mean(0))
        return F.cross_entropy(logits - self.centre, batch[1]) - self.critic(logits).mean()

    def state(self):
        tensors = {name: tensor.tolist() for name, tensor in self.state_dict().items()}
        return tensors, self.calls, len(self.log), self.sums.tolist(), [part.training for part in self.modules()]


class Trainer:
    """Holds what computes the loss."""

    def __init__(self, criterion):
        self.criterion = criterion

    def loss(self, batch):
        return self.computed(batch)

    def computed(self, batch):
        return self.criterion(batch)

    def __call__(self, batch):
        return self.computed(batch)


def closure_over(trainer):
    return lambda batch: trainer.loss(batch)


LOSSES = {
    "a module": lambda criterion: criterion,
    "a closure": lambda criterion: lambda batch: criterion(batch),
    "a method": lambda criterion: Trainer(criterion).loss,
    "an object": lambda criterion: Trainer(criterion),
    "a partial": lambda criterion: partial(lambda to, batch: to(batch), criterion),
    "a closure over an object": lambda criterion: closure_over(Trainer(criterion)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_the_loss_uses_is_afterwards_as_it_was(make_toy, kind):
    model = make_toy()
    criterion = Centred(model)
    _, controller = start(model)
    before = criterion.state()
    controller.look(loader_of(), LOSSES[kind](criterion))
    assert controller.looked > 5
    assert criterion.state() == before


class Noise:
    """A transform that draws by itself."""

    def __init__(self, kind):
        self.random = kind(0)

    def __call__(self, x):
        return x + float(self.random.standard_normal())

    def state(self):
        return str(self.random.get_state() if hasattr(self.random, "get_state") else self.random.bit_generator.state)


class NoiseOfAPackage(Noise):
    """Of another package than the data set."""


NoiseOfAPackage.__module__ = "elsewhere.noise"


class Noisy(Dataset):
    """Samples under a transform."""

    def __init__(self, transform):
        self.transform, self.seen = transform, np.zeros(len(X))

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.seen[index] += 1
        return self.transform(X[index]), Y[index]


TRANSFORMS = {
    "an object": lambda noise: noise,
    "a function": lambda noise: lambda x: noise(x),
    "a method": lambda noise: noise.__call__,
}


@pytest.mark.parametrize("within", [lambda data: data, lambda data: ConcatDataset([Subset(data, range(48))])])
@pytest.mark.parametrize("random_kind", [np.random.RandomState, np.random.default_rng])
@pytest.mark.parametrize(
    ("transform", "noise_kind"),
    [
        (transform, kind)
        for transform in TRANSFORMS
        for kind in (Noise, NoiseOfAPackage)
        if kind is Noise or transform != "a function"  # what code names of other packages is left alone
    ],
)
def test_generators_of_the_data_are_where_they_were(make_toy, transform, noise_kind, random_kind, within):
    noise, model = noise_kind(random_kind), make_toy()
    data = Noisy(TRANSFORMS[transform](noise))
    before = noise.state()
    _, controller = start(model)
    looked_at(model, controller, DataLoader(within(data), batch_size=6))
    assert controller.looked > 5
    assert noise.state() == before
    assert data.seen.sum() == 0


@pytest.mark.parametrize("wrap", [lambda loader: loader, Wrapped, lambda loader: Wrapped(Wrapped(loader)), generated])
@pytest.mark.parametrize("order", ["generator", "sieve"])
def test_the_training_gets_the_samples_in_the_order_that_it_would_have_got(make_toy, order, wrap):
    orders = []
    for looks in (False, True):
        own = {"shuffle": True, "generator": torch.Generator().manual_seed(5)}
        seed_all()
        loader = loader_of(**(own if order == "generator" else {"shuffle": None, "sampler": SieveSampler(len(X))}))
        model = make_toy()
        _, controller = start(model)
        if looks:
            looked_at(model, controller, wrap(loader))
            assert controller.looked > 4
        orders.append([y.tolist() for _ in range(2) for _, y in wrap(loader)])
    assert orders[0] == orders[1]

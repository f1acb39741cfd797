"""What changes while features are kept is noticed in time: the losses are those without a cache."""

import copy
import random
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.functional import mse_loss

from predictor import FeatureCache, FreezeController, make_policy
from predictor.errors import UsageError
from tests.predictor.counted import Notes
from tests.predictor.scripted import Script

SAMPLES, SIZE = 24, 6
generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(SAMPLES, 4, generator=generator)
TARGET = ROWS.sum(1, keepdim=True)
GAIN = {"value": 1.0}
FACTOR = 1.0
norm = 0.0


def network(first=None):
    return nn.Sequential(first or nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def plain_loss(model, ids, x):
    return mse_loss(model(x), TARGET[ids])


def plain_batches(epoch):
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    return [(ids, ROWS[ids]) for ids in order.split(SIZE)]


def losses(
    make, between, cached, loss_of=plain_loss, batches=plain_batches, optimizer=torch.optim.SGD, epochs=4, **kinds
):
    """The losses of some epochs under a static policy, and the cache. between: is called before each epoch."""
    torch.manual_seed(0)
    random.seed(0)
    model = make()
    made = optimizer(model.parameters(), 0.05)
    controller = FreezeController(model, made, make_policy("static", layers=1), total_steps=999, say=None)
    cache = FeatureCache(controller, **kinds)
    found = []
    for epoch in range(epochs):
        between(model, epoch)
        for ids, *inputs in batches(epoch):
            if cached:
                with cache.batch(ids):
                    loss = loss_of(model, ids, *inputs)
            else:
                loss = loss_of(model, ids, *inputs)
            loss.backward()
            made.step()
            controller.step()
            made.zero_grad()
            found.append(loss.item())
    return found, cache


def check(make, between=lambda model, epoch: None, **options):
    """Compare the losses with and without a cache. Returns the cache."""
    expected, _ = losses(make, between, cached=False, **options)
    found, cache = losses(make, between, cached=True, **options)
    assert found == pytest.approx(expected, rel=1e-5)
    return cache


def in_epoch(number, act):
    def between(model, epoch):
        if epoch == number:
            act(model)

    return between


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return self.drop(self.norm(self.linear(x)) + self.shift)


def with_mode(name):
    def act(model):
        getattr(model[0], name).training = True

    return act


class Settings:
    gain = 1.0


class Set(nn.Module):
    """Has settings of every kind."""

    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.network, self.settings, self.table, self.scale = network(), Settings(), {"gain": 1.0}, torch.ones(())

    def forward(self, x):
        gain = self.settings.gain * self.table["gain"] * self.scale * GAIN["value"] * FACTOR
        return self.network(x * gain / self.temperature)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize(
    "act",
    [
        lambda model: setattr(model, "temperature", 2.0),
        lambda model: setattr(model.settings, "gain", 2.0),
        lambda model: model.table.update(gain=2.0),
        lambda model: model.scale.fill_(2.0),
        lambda model: GAIN.update(value=2.0),
        lambda model: globals().update(FACTOR=2.0),
    ],
)
def test_settings_of_modules_and_global_names(act, epoch):
    def reset(model, number):
        if number == 0:
            GAIN.update(value=1.0)
            globals().update(FACTOR=1.0)
        in_epoch(epoch, act)(model, number)

    cache = check(Set, reset)
    assert "a state that changes" in cache.reason
    assert cache.hits == 4 * (epoch - 1)


class Scheduled(nn.Module):
    """Goes by its own count of passes, and changes in the middle of an epoch."""

    def __init__(self):
        super().__init__()
        self.network, self.passes = network(), 0

    def forward(self, x):
        self.passes += self.training
        return self.network(x if self.passes < 11 else 2 * x)


def test_a_setting_that_changes_within_an_epoch():
    assert "a state that changes" in check(Scheduled).reason


ROWS_RUN = Notes()


class Traced(nn.Linear):
    """Notes on how many samples it is run."""

    def forward(self, x):
        ROWS_RUN.append(len(x))
        return super().forward(x)


class Amount:
    """An object of a module's, with a setting."""

    value = 0.0


SHARED = {"value": 0.0}
AMOUNT = Amount()


class Seldom(nn.Module):
    """Features of two samples depend on an amount, which lies in one of many places."""

    def __init__(self, read):
        super().__init__()
        self.network, self.read = network(Traced(4, 8)), read
        self.register_buffer("level", torch.zeros(()))
        self.amount, self.table, self.items, self.object = 0.0, {"value": 0.0}, [0.0], Amount()
        self.tensor = torch.zeros(())

    def forward(self, x):
        shared = {"dict": SHARED["value"], "object": AMOUNT.value}
        amount = shared[self.read] if isinstance(self.read, str) else self.read(self)
        return self.network(x * (1 - amount * (x[:, :1] > LARGE)))


LARGE = float(ROWS[:, 0].sort().values[-3])
PLACES = {
    lambda model: model.level: lambda model, value: model.level.fill_(value),
    lambda model: model.level + 0: lambda model, value: model.register_buffer("level", torch.tensor(value)),
    lambda model: model.amount: lambda model, value: setattr(model, "amount", value),
    lambda model: model.table["value"]: lambda model, value: model.table.update(value=value),
    lambda model: model.items[0]: lambda model, value: model.items.__setitem__(0, value),
    lambda model: model.object.value: lambda model, value: setattr(model.object, "value", value),
    lambda model: model.tensor: lambda model, value: model.tensor.fill_(value),
    lambda model: model.tensor + 0: lambda model, value: setattr(model, "tensor", torch.tensor(value)),
    lambda model: getattr(model, "later", 0.0): lambda model, value: setattr(model, "later", value),
    "dict": lambda model, value: SHARED.update(value=value),
    "object": lambda model, value: setattr(AMOUNT, "value", value),
}
"""How an amount is read, and how it is set."""


@pytest.mark.parametrize("amounts", [[0, 0, 0.5, 0.5], [0, 0.1, 0.2, 0.3], [0, 0, 1e-9, 2e-9, 3e-9, 0.5]])
@pytest.mark.parametrize("read", PLACES)
def test_a_value_on_which_features_of_few_samples_depend(read, amounts):
    cache = check(
        lambda: Seldom(read), lambda model, epoch: PLACES[read](model, float(amounts[epoch])), epochs=len(amounts)
    )
    assert "a state that changes" in cache.reason or "changes so often" in cache.reason


class Flagged(nn.Module):
    """Asks of an attribute what it is, for features of two samples, and reads no number from it."""

    def __init__(self, ask):
        super().__init__()
        self.network, self.ask, self.value = network(), ask, None

    def forward(self, x):
        return self.network(x * (1 + bool(self.ask(self)) * (x[:, :1] > LARGE)))


@pytest.mark.parametrize(
    ("ask", "values"),
    [
        (lambda model: model.value is None, [ROWS, TARGET, ROWS + 1, None]),
        (lambda model: model.value is None, ["one", "two", "three", None]),
        (lambda model: model.value is True, [False, None, False, True]),
        (lambda model: model.value is False, [True, None, True, False]),
        (lambda model: not model.value, [[1], [1, 2], [1, 2, 3], []]),
        (lambda model: model.value == "fast", ["slow", "slower", "slow", "fast"]),
        (lambda model: model.value in (1, 2), [3, 4, 5, 1]),
        (lambda model: model.value + 1 > 3, [0, 1, 2, 3]),
        (lambda model: isinstance(model.value, int) and model.value > 2, [0, 1, 2, 3]),
    ],
)
def test_an_attribute_that_is_asked_for_what_it_is(ask, values):
    cache = check(lambda: Flagged(ask), lambda model, epoch: setattr(model, "value", values[epoch]))
    assert cache.reason


class Busy(nn.Module):
    """Has a value that changes with every batch, and on which no feature depends."""

    def __init__(self, act):
        super().__init__()
        self.network, self.act = network(Traced(4, 8)), act
        self.passes, self.last, self.task = 0, None, ""
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        self.act(self, x)
        return self.network(x)


def counts(model, x):
    model.passes += 1


def keeps_a_tensor(model, x):
    model.last = x


def names_its_task(model, x):
    model.task = f"task {float(x.sum()):.3f}"


def counts_in_a_buffer(model, x):
    model.count += 1


def keeps_a_mean(model, x):
    model.count.lerp_(x.detach().mean(), 0.1)


def counts_and_asks(model, x):
    model.passes += 1
    assert model.passes > 0


def writes_what_was_there(model, x):
    model.scale.fill_(1.0)


def replaces_by_what_was_there(model, x):
    model.scale = torch.ones(3)


@pytest.mark.parametrize(
    "act", [counts, keeps_a_tensor, names_its_task, writes_what_was_there, replaces_by_what_was_there]
)
def test_a_value_that_changes_with_every_batch_costs_little_where_nothing_reads_it(act):
    ROWS_RUN.clear()
    cache = check(lambda: Busy(act), epochs=12)
    assert (cache.reason, cache.hits) == ("", 44)
    without = 12 * SAMPLES
    assert sum(ROWS_RUN) - without < 6 * SAMPLES  # the first epoch, the search and a few checks


@pytest.mark.parametrize("act", [counts_in_a_buffer, keeps_a_mean, counts_and_asks])
def test_a_value_that_changes_with_every_batch_and_may_be_read_switches_the_cache_off_soon(act):
    cache = check(lambda: Busy(act), epochs=6)
    assert "changes so often" in cache.reason
    assert ("Busy.passes" if act is counts_and_asks else "Busy.count") in cache.reason
    assert cache.hits == 8  # two epochs


def test_a_value_that_changes_with_every_batch_in_the_loop_and_not_in_the_model():
    def loss_of(model, ids, x):
        model.passes, model.last = model.passes + 1, x
        return plain_loss(model, ids, x)

    cache = check(lambda: Busy(lambda *_: None), loss_of=loss_of, epochs=6)
    assert (cache.reason, cache.hits) == ("", 20)


class Named(nn.Module):
    """Has an attribute with the name of a global variable."""

    def __init__(self):
        super().__init__()
        self.network, self.norm = network(), nn.Identity()

    def forward(self, x):
        return self.network(self.norm(x))


def test_a_global_variable_with_the_name_of_an_attribute():
    def loss_of(model, ids, x):
        globals()["norm"] += 1
        return plain_loss(model, ids, x)

    cache = check(Named, loss_of=loss_of, epochs=6)
    assert (cache.reason, cache.hits) == ("", 20)


def test_after_a_change_each_sample_is_seen_once_more():
    def rows_of_the_prefix(change):
        ROWS_RUN.clear()
        cache = check(lambda: Busy(lambda *_: None), in_epoch(3, change), epochs=8)
        assert (cache.reason, cache.hits) == ("", 28)
        return sum(ROWS_RUN)

    without = rows_of_the_prefix(lambda model: None)
    few = 2  # at the second hit and so on, and with a new epoch: some of these checks are spared
    assert SAMPLES - 2 * few <= rows_of_the_prefix(lambda model: model.count.fill_(5.0)) - without <= SAMPLES


def test_a_change_in_each_of_the_first_epochs_does_not_switch_the_cache_off():
    def warms_up(model, epoch):
        model.count.fill_(min(epoch, 2))

    cache = check(lambda: Busy(lambda *_: None), warms_up, epochs=6)
    assert (cache.reason, cache.hits) == ("", 20)


def test_a_prefix_that_grows_is_not_filled_from_features_that_were_not_seen_since_a_change():
    model = Seldom(lambda model: model.amount)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    controller = FreezeController(model, optimizer, Script({0: {0}, 5: {0, 1}}), total_steps=999, say=None)
    cache = FeatureCache(controller)
    order = ROWS[:, 0].argsort()  # the two samples that depend on the amount come last
    for step in range(9):
        model.amount = 0.5 * (step > 5)
        ids = order[:18] if step == 6 else order
        with cache.batch(ids):
            output = model(ROWS[ids])
        assert torch.allclose(output, model(ROWS[ids]), atol=1e-5)
        controller.step()


def test_a_value_that_is_another_one_when_a_training_is_continued():
    def trained(amount, state=None):
        model = Seldom(lambda model: model.amount)
        model.amount = amount
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        policy = make_policy("static", layers=1)
        cache = FeatureCache(FreezeController(model, optimizer, policy, total_steps=99, say=None))
        if state is not None:
            model.load_state_dict(state[0])
            cache.load_state_dict(state[1])
        for _ in range(2):
            for ids, x in plain_batches(0):
                with cache.batch(ids):
                    output = model(x)
                assert torch.allclose(output, model(x), atol=1e-5)
        return model.state_dict(), cache.state_dict()

    assert "a state that changes" in trained(0.5, trained(0.0))[1]["reason"]


@pytest.mark.parametrize("act", [with_mode("norm"), with_mode("drop"), lambda model: model[0].shift.data.add_(1.0)])
def test_modes_and_buffers_of_the_prefix(act):
    cache = check(lambda: network(Normed()), in_epoch(2, act))
    assert "a state that changes" in cache.reason
    assert cache.hits == 4


def scaled(model):
    model[0].scale.fill_(2.0)


def other_gain(model):
    model[0].gain = 2.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gain, self.calls = nn.Linear(4, 8), 1.0, 0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.scale * self.gain


@pytest.mark.parametrize("act", [scaled, other_gain])
def test_features_begin_anew_where_inputs_need_not_be_what_they_were(act):
    cache = check(lambda: network(Scaled()), in_epoch(2, act), check_inputs=False)
    assert (cache.reason, cache.hits) == ("", 8)
    assert check(lambda: network(Scaled()), check_inputs=False).hits == 12


def replaced(model):
    torch.manual_seed(7)
    model[0] = nn.Linear(4, 8).requires_grad_(False)


def reassigned(model):
    model[0].weight.data = 1.5 * model[0].weight


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model[0].weight.data.mul_(1.5),
        reassigned,
        replaced,
        lambda model: setattr(model[0], "weight", nn.Parameter(2 * model[0].weight, requires_grad=False)),
        lambda model: model.load_state_dict({name: 1.2 * value for name, value in model.state_dict().items()}),
    ],
)
def test_other_weights_are_noticed_at_once_and_features_are_kept_anew(act):
    cache = check(network, in_epoch(2, act))
    assert (cache.reason, cache.hits) == ("", 8)


def test_a_small_write_to_weights_of_a_short_type_is_noticed():
    model = network(nn.Linear(4, 64)).bfloat16()
    model[2] = nn.Linear(64, 8).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # with a norm of 16, next to which bfloat16 has 16.125
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    cache = FeatureCache(FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=9, say=None))
    batches = [ids for _ in range(2) for ids in torch.arange(SAMPLES).split(SIZE)]
    for ids in batches[:-2]:  # two hits, of which the second is checked, and the third is not
        with cache.batch(ids):
            model(ROWS[ids].bfloat16())
    model[0].weight.data[0, 0] += 0.5  # and the norm becomes 16.04
    with cache.batch(batches[-2]):
        found = model(ROWS[batches[-2]].bfloat16())
    assert torch.equal(found, model(ROWS[batches[-2]].bfloat16()))
    assert cache.hits == 2


def test_weights_that_are_written_to_again_and_again_switch_the_cache_off():
    cache = check(network, lambda model, epoch: model[0].weight.data.mul_(1.01), epochs=6)
    assert "again and again" in cache.reason
    assert cache.hits == 0


class Lookahead(torch.optim.SGD):
    """Draws all weights back to where they were some steps ago."""

    def __init__(self, weights, rate):
        self.all = list(weights)
        self.slow = [weight.detach().clone() for weight in self.all]
        self.steps = 0
        super().__init__(self.all, rate)

    def step(self):
        super().step()
        self.steps += 1
        if self.steps % 3 == 0:
            for weight, slow in zip(self.all, self.slow, strict=True):
                weight.data.copy_(slow.lerp_(weight.detach(), 0.5))


def test_an_optimizer_that_writes_to_all_weights():
    assert check(network, optimizer=Lookahead).reason == ""


def test_a_layer_that_the_user_opens_is_not_skipped():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cache = FeatureCache(FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=9, say=None))
    for _ in range(2):
        with cache.batch(range(SAMPLES)):
            model(ROWS)
    model[0].weight.requires_grad_(True)
    with cache.batch(range(SAMPLES)):
        output = model(ROWS)
    assert "trained again" in cache.reason
    assert torch.autograd.grad(output.sum(), model[0].weight)[0].any()


SEEN = []


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: layer.register_forward_hook(lambda module, args, output: 2 * output),
        lambda layer: layer.register_forward_hook(lambda module, args, output: SEEN.append(output)),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: SEEN.append(args[0])),
    ],
)
def test_a_hook_that_is_added_later(hook):
    SEEN.clear()
    cache = check(network, in_epoch(2, lambda model: hook(model[0])))
    assert "has got a hook" in cache.reason
    assert all(each.isfinite().all() for each in SEEN)
    assert len(SEEN) in (0, 2 * 8)  # each pass in training, and none of the cache's own


def collected(model, ids, x):
    seen = []
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    loss = plain_loss(model, ids, x)
    for handle in handles:
        handle.remove()
    return loss + 0.1 * sum(each.square().mean() for each in seen)


def collected_everywhere(model, ids, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(output))
    loss = plain_loss(model, ids, x)
    handle.remove()
    return loss + 0.1 * sum(each.square().mean() for each in seen)


@pytest.mark.parametrize("loss_of", [collected, collected_everywhere])
def test_hooks_for_one_pass_see_that_pass_alone(loss_of):
    assert "forward hook" in check(network, loss_of=loss_of).reason


class Keeping(nn.Module):
    """Leaves its features in an attribute, or in a list there."""

    def __init__(self):
        super().__init__()
        self.linear, self.features = nn.Linear(4, 8), []

    def forward(self, x):
        self.features[:] = [self.linear(x)]
        return self.features[0]


def test_what_the_loss_reads_from_a_frozen_module_is_of_this_pass():
    def loss_of(model, ids, x):
        loss = plain_loss(model, ids, x)
        return loss + model[2](model[0].features[0]).square().mean()

    assert "for others to read" in check(lambda: network(Keeping()), loss_of=loss_of).reason


class Flipping(nn.Module):
    """Augments inside, seldom, in training or always."""

    def __init__(self, always, own):
        super().__init__()
        self.network, self.always = network(), always
        self.drawn = torch.Generator().manual_seed(0) if own else None

    def forward(self, x):
        if self.always or self.training:
            chance = random.random() if self.drawn is None else float(torch.rand((), generator=self.drawn))
            x = -x if chance < 0.1 else x
        return self.network(x)


@pytest.mark.parametrize(("always", "own"), [(True, False), (True, True), (False, False)])
def test_rare_random_numbers(always, own):
    cache = check(lambda: Flipping(always, own))
    assert "random numbers" in cache.reason
    assert cache.hits == 0


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (network, lambda x, epoch: x + 2e-3 * epoch),
        (network, lambda x, epoch: torch.where(x > 2, -x, x) if epoch else x),
        (lambda: nn.Sequential(nn.Flatten(), *network()), lambda x, epoch: x.double().float() * (1 + 1e-6 * epoch)),
    ],
)
def test_a_sample_that_changes_a_little(make, change):
    def batches(epoch):
        return [(ids, change(x, epoch)) for ids, x in plain_batches(epoch)]

    with pytest.warns(UserWarning, match="the feature cache is off"):
        cache = check(make, batches=batches)
    assert "is not what it was" in cache.reason
    assert cache.hits < 4  # those without such a sample


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(30000, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens).mean(1)).tanh())


def test_one_token_of_a_text_that_changes():
    texts = torch.randint(0, 30000, (SAMPLES, 12), generator=torch.Generator().manual_seed(1))

    def batches(epoch):
        return [(ids, texts[ids].index_fill(1, torch.tensor(3), 7 * epoch)) for ids, _ in plain_batches(epoch)]

    with pytest.warns(UserWarning, match="the feature cache is off"):
        check(Tokens, batches=batches)


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.middle, self.head = (nn.Linear(n, m) for n, m in ((4, 8), (4, 8), (8, 8), (8, 1)))

    def forward(self, x, y):
        return self.head(self.middle((self.first(x) - self.second(y)).tanh()).tanh())


def test_arguments_that_change_places():
    def batches(epoch):
        pairs = [(ids, x, 2 * x) for ids, x in plain_batches(epoch)]
        return pairs if epoch % 2 else [(ids, y, x) for ids, x, y in pairs]

    with pytest.warns(UserWarning, match="the feature cache is off"):
        check(Difference, batches=batches, loss_of=lambda model, ids, x, y: mse_loss(model(x, y), TARGET[ids]))


@pytest.mark.parametrize("begins", [True, False])
def test_autocast_that_is_switched(begins):
    def loss_of(model, ids, x, on):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            output = model(x)
        return mse_loss(output.float(), TARGET[ids])

    def batches(epoch):
        return [(ids, x, (epoch < 2) == begins) for ids, x in plain_batches(epoch)]

    cache = check(network, batches=batches, loss_of=loss_of)
    assert "autocast" in cache.reason
    assert cache.hits == 4


def test_a_model_that_is_converted():
    def batches(epoch):
        return [(ids, x.double() if epoch > 1 else x) for ids, x in plain_batches(epoch)]

    def loss_of(model, ids, x):
        return mse_loss(model(x), TARGET[ids].to(x.dtype))

    cache = check(network, in_epoch(2, nn.Module.double), batches=batches, loss_of=loss_of)
    assert (cache.reason, cache.hits) == ("", 8)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(0, SIZE)])
def test_a_test_of_the_model_within_a_batch(rows):
    def loss_of(model, ids, x):
        model.eval()
        with torch.no_grad():
            model(ROWS[rows])
        model.train()
        return plain_loss(model, ids, x)

    cache = check(network, loss_of=loss_of)
    assert (cache.reason, cache.hits) == ("", 12)


def filled():
    """A model with a cache that knows its first samples, and what it gives for all."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cache = FeatureCache(FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=9, say=None))
    for _ in range(2):
        with cache.batch(range(6)):
            model(ROWS[:6])
    return model, cache, model(ROWS)


def test_of_batches_within_each_other_the_inner_one_counts():
    model, cache, expected = filled()
    with cache.batch(range(6)):
        with cache.batch(range(6, 12)):
            inner = model(ROWS[6:12])
        outer = model(ROWS[:6])
    assert torch.allclose(inner, expected[6:12])
    assert torch.allclose(outer, expected[:6])
    assert (cache.hits, cache.misses) == (2, 2)


def test_another_thread_s_pass_is_its_own():
    model, cache, expected = filled()
    found = []
    thread = threading.Thread(target=lambda: found.append(model(ROWS[6:12])))

    def meanwhile(module, args):
        if not thread.ident:
            thread.start()
            thread.join()

    handle = model[2].register_forward_pre_hook(meanwhile)
    with cache.batch(range(6)):
        assert torch.allclose(model(ROWS[:6]), expected[:6])
    handle.remove()
    assert torch.allclose(found[0], expected[6:12])
    assert cache.hits == 2


def test_a_copy_of_the_model_and_a_call_with_other_weights_run_whole():
    model, cache, expected = filled()
    with cache.batch(range(6)):
        assert torch.allclose(copy.copy(model)(ROWS[:6]), expected[:6])  # as DataParallel's replicas are
    assert "DataParallel" in cache.reason
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    with cache.batch(range(6)):
        output = functional_call(model, doubled, (ROWS[:6],))
    assert torch.allclose(output, functional_call(model, doubled, (ROWS[:6],)))


def test_what_fails_within_the_cache_switches_it_off_and_the_training_goes_on(monkeypatch):
    model, cache, expected = filled()
    monkeypatch.setattr("predictor.cache.store.FeatureStore.fetch", lambda *_: 1 // 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"), cache.batch(range(6)):
        assert torch.allclose(model(ROWS[:6]), expected[:6])
    assert "ZeroDivisionError" in cache.reason
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ids", [[True] * 6, "abcdef", 5, None, torch.tensor(3), torch.ones(6, dtype=torch.bool)])
def test_ids_of_other_kinds_are_refused(ids):
    _, cache, _ = filled()
    with pytest.raises(UsageError, match=r"ids?[ =]"), cache.batch(ids):
        pass


def test_wrong_ids_are_refused_with_the_first_batch_before_anything_is_frozen():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = make_policy("static", layers=0)
    cache = FeatureCache(FreezeController(model, optimizer, policy, total_steps=9, say=None))
    with pytest.raises(UsageError, match="no tensor with 5 rows"), cache.batch(range(5)):
        model(ROWS[:6])


class Graphs(nn.Module):
    """Is called with the nodes of all graphs of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, nodes, graph_of):
        hidden = self.second(self.first(nodes).tanh()).tanh()
        return self.head(hidden.new_zeros(int(graph_of.max()) + 1, 8).index_add(0, graph_of, hidden))


class Folded(nn.Module):
    """Is called with the frames of all videos of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, frames):
        return self.head(self.second(self.first(frames).tanh()).tanh().view(-1, 3, 8).mean(1))


def graphs_of(ids):
    sizes = [1 + i % 3 for i in ids.tolist()]
    nodes = torch.cat([ROWS[i].expand(size, 4) for i, size in zip(ids.tolist(), sizes, strict=True)])
    return nodes, torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(sizes))


@pytest.mark.parametrize(
    ("make", "inputs"), [(Graphs, graphs_of), (Folded, lambda ids: (ROWS[ids].repeat_interleave(3, 0),))]
)
def test_models_that_get_no_rows_of_samples_are_left_alone(make, inputs):
    def batches(epoch):
        return [(ids, *inputs(ids)) for ids, _ in plain_batches(epoch)]

    cache = check(make, batches=batches, loss_of=lambda model, ids, *args: mse_loss(model(*args), TARGET[ids]))
    assert "no rows of samples" in cache.reason


class Hidden(nn.Module):
    """Reads a weight that trains in front of a frozen layer, without a call of its module."""

    def __init__(self):
        super().__init__()
        self.network, self.aside = network(), nn.Linear(4, 4)

    def forward(self, x):
        return self.network(F.linear(x, self.aside.weight))


def test_weights_that_train_and_are_read_without_a_call():
    cache = check(Hidden)
    assert cache.hits == 0
    assert cache.reason


class Capturing(nn.Module):
    """Installs hooks on its layers in its first pass, and notes that they are there, as Transformers' models do."""

    def __init__(self):
        super().__init__()
        self.network, self.hooked, self.captured = network(), False, []

    def forward(self, x):
        if not self.hooked:
            self.network[2].register_forward_hook(lambda module, args, output: self.captured.append(output))
            self.hooked = True
        self.captured.clear()
        return self.network(x) + sum(output.mean() for output in self.captured)


def test_hooks_that_a_model_installs_in_its_first_pass_are_installed_once():
    check(Capturing)

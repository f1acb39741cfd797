"""The cache is right or off: with a cache the losses are those without, whatever the model and its arguments do."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, mse_loss

from predictor import FeatureCache, FreezeController, make_policy
from predictor.errors import UsageError

SAMPLES = 24
STEPS = 5
generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(SAMPLES, 4, generator=generator)
SEQUENCES = torch.randn(SAMPLES, STEPS, 4, generator=generator)
TARGET = ROWS.sum(1, keepdim=True)


def losses(make, batches, cached, loss_of=None, layers=1):
    """The losses of three epochs under a static policy, and the cache."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    controller = FreezeController(model, optimizer, make_policy("static", layers=layers), total_steps=999, say=None)
    cache = FeatureCache(controller)
    found = []
    torch.manual_seed(1)
    for epoch in range(3):
        for ids, *inputs in batches(epoch):
            if cached:
                with cache.batch(ids):
                    loss = (loss_of or plain_loss)(model, ids, *inputs)
            else:
                loss = (loss_of or plain_loss)(model, ids, *inputs)
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found, cache


def plain_loss(model, ids, *inputs):
    return mse_loss(model(*inputs), TARGET[ids].to(torch.get_default_dtype()))


def check(make, batches, **options):
    """Compare the losses with and without a cache. Returns the cache."""
    expected, _ = losses(make, batches, cached=False, **options)
    found, cache = losses(make, batches, cached=True, **options)
    assert found == pytest.approx(expected, rel=1e-4)
    return cache


def orders(epoch, size=6):
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(size)


def rows_of(data, size=6, dim=0):
    return lambda epoch: [(ids, data.index_select(dim, ids)) for ids in orders(epoch, size)]


def network(first=None, width=8):
    return nn.Sequential(first or nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))


class LastState(nn.Module):
    """Reads the last hidden state of a frozen recurrent network, whose first dimension is not that of the samples."""

    def __init__(self, layers, bidirectional):
        super().__init__()
        self.memory = nn.LSTM(4, 8, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        _, (hidden, _) = self.memory(x)
        return self.head(hidden[-1])


class StepsFirst(nn.Module):
    """Its features have the steps first; its inputs too, where it does not turn them round itself."""

    def __init__(self, turn):
        super().__init__()
        self.turn = turn
        self.prefix, self.memory, self.head = nn.Linear(4, 8), nn.GRU(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.prefix(x.transpose(0, 1) if self.turn else x).relu()
        steps, _ = self.memory(hidden.view(hidden.shape))
        return self.head(steps[-1])


@pytest.mark.parametrize(
    ("make", "size", "dim"),
    [
        (partial(LastState, 2, False), 2, 0),
        (partial(LastState, 1, True), 2, 0),
        (partial(LastState, 2, True), 4, 0),
        (partial(StepsFirst, True), STEPS, 0),
        (partial(StepsFirst, True), 6, 0),
        (partial(StepsFirst, False), 6, 1),
        (partial(StepsFirst, False), STEPS, 1),
    ],
)
def test_the_dimension_of_the_samples_is_found(make, size, dim):
    cache = check(make, rows_of(SEQUENCES if dim == 0 else SEQUENCES.transpose(0, 1), size, dim))
    assert cache.reason == ""
    assert cache.hits > 0


def test_where_nothing_shows_which_dimension_is_that_of_the_samples_the_cache_is_off():
    class Loss(nn.Sequential):
        def forward(self, x):
            return super().forward(x).square().mean()

    batches = rows_of(SEQUENCES.transpose(0, 1), STEPS, dim=1)
    cache = check(lambda: Loss(*network()), batches, loss_of=lambda model, ids, x: model(x))
    assert "which is that of the samples" in cache.reason


class Centred(nn.Module):
    """What it gives for a sample depends on the others of the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        out = self.linear(x)
        return out - out.mean(0)


class Noisy(Centred):
    """Random in evaluation mode too."""

    def forward(self, x):
        return self.linear(x) + torch.randn(len(x), 8)


class Dropping(Centred):
    """Drops without asking for the mode."""

    def forward(self, x):
        return dropout(self.linear(x), 0.5)


class Moving(Centred):
    """Keeps a mean of what it has seen in a plain attribute."""

    mean = 0.0

    def forward(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        return self.linear(x - self.mean)


class Buffered(Centred):
    """Keeps a mean of what it has seen in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        return self.linear(x - self.mean)


@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Centred, "depend on the other samples"),
        (Noisy, "random numbers"),
        (Dropping, "random numbers"),
        (Moving, "a state between batches"),
        (Buffered, "a state between batches"),
    ],
)
def test_features_that_depend_on_more_than_their_sample_switch_the_cache_off(kind, reason, size):
    cache = check(lambda: network(kind()), rows_of(ROWS, size))
    assert reason in cache.reason
    assert cache.hits == 0


class RunningMean(nn.Module):
    """Takes off the mean of all batches before, which moves in training alone."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        out = self.network(x - self.mean)
        if self.training:
            self.mean.lerp_(x.mean(0), 0.5)
        return out


class Gained(nn.Module):
    """Has a setting that the training loop changes from epoch to epoch."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x * self.gain)


def loss_with_gain(model, ids, x, gain):
    model.gain = gain
    return plain_loss(model, ids, x)


@pytest.mark.parametrize(
    ("make", "batches", "loss_of"),
    [
        (RunningMean, rows_of(ROWS), None),
        (Gained, lambda epoch: [(ids, ROWS[ids], 1.0 + epoch) for ids in orders(epoch)], loss_with_gain),
    ],
)
def test_a_state_that_changes_outside_of_the_layers_is_noticed_at_the_first_hit(make, batches, loss_of):
    cache = check(make, batches, loss_of=loss_of)
    assert "a state that changes while the model trains" in cache.reason
    assert cache.hits == 0


def test_a_forward_hook_of_the_user_on_a_frozen_layer_sees_each_pass():
    seen = []

    def hooked():
        model = network()
        model[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        return model

    cache = check(hooked, rows_of(ROWS))
    assert cache.reason
    assert all(output.isfinite().all() for output in seen)


class Stateful(nn.Module):
    """Hands its hidden state on to the next batch, as for truncated backpropagation."""

    def __init__(self):
        super().__init__()
        self.entry, self.memory, self.head = nn.Linear(4, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 1)
        self.states = []

    def forward(self, x):
        hidden, state = self.memory(self.entry(x), self.states[-1] if self.states else None)
        self.states.append(state.detach())
        return self.head(hidden[:, -1])


def test_looking_for_a_cut_leaves_plain_attributes_alone():
    check(Stateful, rows_of(SEQUENCES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_default_dtype_works(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        cache = check(network, rows_of(ROWS.to(dtype)))
    finally:
        torch.set_default_dtype(before)
    assert (cache.reason, cache.hits) == ("", 8)


@pytest.mark.parametrize("allow_unused", [False, True])
def test_where_gradients_of_the_inputs_are_wanted_the_model_runs_whole(allow_unused):
    def penalized(model, ids, x):
        x = x.clone().requires_grad_(True)
        loss = plain_loss(model, ids, x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True, allow_unused=allow_unused)
        return loss + gradient.square().sum()

    cache = check(network, rows_of(ROWS), loss_of=penalized)
    assert "gradients of the model's inputs" in cache.reason
    assert cache.hits == 0


class Energy(nn.Module):
    """Differentiates in its forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, positions):
        positions = positions.requires_grad_(True)
        energy = self.head(self.second(self.first(positions).tanh()).tanh())
        (force,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy + force.sum(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:Energy could not be run to see")
def test_a_model_that_differentiates_in_its_forward_pass_runs_whole():
    cache = check(Energy, lambda epoch: [(ids, ROWS[ids].clone()) for ids in orders(epoch)])
    assert "does not run without gradients" in cache.reason


class Masked(nn.Module):
    """Is called with a mask of steps by steps, which is the batch's as little as the model's."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, mask):
        hidden = self.entry(x)
        attended, _ = self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=False)
        return self.head(self.middle(hidden + attended).relu()).mean(1)


@pytest.mark.parametrize(("length", "size"), [(5, 6), (6, 6), (12, 12)])
def test_a_mask_of_the_batch_s_size_is_not_taken_for_samples(length, size):
    sequences = torch.randn(SAMPLES, length, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.triu(torch.full((length, length), float("-inf")), 1)
    batches = rows_of(sequences, size)
    cache = check(Masked, lambda epoch: [(ids, x, mask) for ids, x in batches(epoch)], layers=2)
    assert cache.reason == ""
    assert cache.hits == 2 * SAMPLES // size


class Scaled(nn.Module):
    """Is called with a number, for the frozen layer or for the one that trains."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.prefix, self.middle, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, gain):
        hidden = self.prefix(x * gain if self.frozen else x).relu()
        return self.head(self.middle(hidden if self.frozen else hidden * gain).relu())


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_argument_that_changes_counts_where_features_depend_on_it(kind, frozen):
    cache = check(partial(Scaled, frozen), lambda epoch: [(ids, ROWS[ids], kind(1.0 + epoch)) for ids in orders(epoch)])
    assert ("depend on an argument" in cache.reason) == frozen
    assert cache.hits == (0 if frozen else 8)


class Words(nn.Module):
    """Is called with a list of strings."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.EmbeddingBag(256, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, texts):
        letters = torch.tensor([[ord(letter) for letter in text.ljust(8)] for text in texts])
        return self.head(self.middle(self.embedding(letters)).relu())


def test_arguments_that_cannot_be_compared_switch_the_cache_off():
    cache = check(Words, lambda epoch: [(ids, [f"word {i}" for i in ids.tolist()]) for ids in orders(epoch)])
    assert "without a tensor" in cache.reason

    class Held:
        def __init__(self, x):
            self.x = x

    class Holder(nn.Sequential):
        def forward(self, held):
            return super().forward(held.x)

    cache = check(lambda: Holder(*network()), lambda epoch: [(ids, Held(ROWS[ids])) for ids in orders(epoch)])
    assert "type Held" in cache.reason


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([f"image-{i}.png" for i in range(4)], "image-0.png"),
        ([0.5, 1.5, 2.5, 3.5], "0.5"),
        (torch.arange(4)[:, None], r"\(4, 1\)"),
        (torch.rand(4), "float32"),
        ([2**64 - 1, 1, 2, 3], str(2**64 - 1)),
        ([0, 1, 2], "no tensor with 3 rows"),
        ([0, 1, 1, 2], "id 1 names two different samples"),
    ],
)
def test_ids_that_name_no_samples_are_refused(ids, named):
    model = network()
    controller = FreezeController(
        model, torch.optim.SGD(model.parameters(), 0.1), make_policy("static", layers=1), total_steps=9, say=None
    )
    cache = FeatureCache(controller)
    with pytest.raises(UsageError, match=named), cache.batch(ids):
        model(ROWS[:4])


def test_one_sample_may_come_twice_in_a_batch():
    cache = check(network, lambda epoch: [(ids, ROWS[ids]) for ids in (torch.tensor([3, 0, 3, 1]),)])
    assert (cache.hits, cache.misses) == (2, 1)

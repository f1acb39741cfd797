"""What a hit skips is computed where something reads it all the same: the losses are those without a cache."""

import copy
import gc
import io
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FeatureCache, FreezeController, make_policy

SAMPLES, SIZE, CLASSES = 24, 8, 3
generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(SAMPLES, 6, generator=generator)
TARGET = torch.randint(CLASSES, (SAMPLES,), generator=generator)
TOKENS = torch.randint(1, 20, (SAMPLES, 5), generator=generator)
TOKENS[16:, 3:] = 0  # padding, which the first batches have none of


class Network(nn.Module):
    """Two layers that freeze, one that trains, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        self.early = False
        self.left = None

    def forward(self, x):
        early = self.first(x).relu()
        late = self.third(self.second(early).relu())
        return self.finish(early, late)

    def finish(self, early, late):
        return self.head((late + early if self.early else late).relu())


class Deep(Network):
    """Has a head on its first layer, in training alone."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, CLASSES)

    def finish(self, early, late):
        return (self.head(late.relu()), self.other(early)) if self.training else self.head(late.relu())


class OnRequest(Network):
    def forward(self, x, features=False):
        early = self.first(x).relu()
        late = self.third(self.second(early).relu())
        return (self.head(late.relu()), [early]) if features else self.head(late.relu())


class ByNumbers(Network):
    """Takes a branch by what is in its batch."""

    def finish(self, early, late):
        chosen = torch.where(late.detach().mean(1, keepdim=True) > self.limit, early, late)
        return self.head(chosen.relu())

    limit = 9.0


class Branching(Network):
    def finish(self, early, late):
        return self.head((late + early if len(late) < SIZE else late).relu())


class InPlace(Network):
    """Writes to what it reads later, and to a view of it."""

    def forward(self, x):
        early = self.first(x)
        half = early[:, :4]
        half.mul_(2.0)
        early.relu_()
        late = self.third(self.second(early).relu())
        return self.finish(early, late)


class Normed(Network):
    """Has statistics of what is skipped, and random numbers behind them."""

    def finish(self, early, late):
        if self.early:
            normed = F.batch_norm(early, torch.zeros(8), torch.ones(8), training=True)
            late = late + F.dropout(normed, 0.5, training=True)
        return self.head(late.relu())


class Leaving(Network):
    """Leaves features in an attribute, from the time that it is asked to."""

    def finish(self, early, late):
        self.left = early if self.early else None
        return self.head(late.relu())


class Buffering(Network):
    """Leaves features in a buffer, which passes beside the training bring back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(SIZE, 8))

    def finish(self, early, late):
        if self.early:
            self.kept = early
        return self.head(late.relu())


class Averaging(Buffering):
    """Writes to what an earlier pass has left."""

    def finish(self, early, late):
        if self.early:
            self.left = early if self.left is None else self.left.mul_(0.5).add_(early)
            self.kept = self.left
        return self.head(late.relu())


@dataclass
class Features:
    maps: list


class Boxed(Network):
    def finish(self, early, late):
        return self.head(late.relu()), Features([early])


class Text(nn.Module):
    """Its embedding returns which tokens are padding."""

    def __init__(self):
        super().__init__()

        class Embedding(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(20, 8)

            def forward(self, tokens):
                return self.table(tokens), tokens == 0

        self.first, self.second, self.third = Embedding(), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        embedded, padding = self.first(tokens)
        late = self.third(self.second(embedded).relu())
        late = late.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.head(late)


def trained(
    make, cached, loss_of, change=lambda model, epoch: None, rows=ROWS, size=SIZE, epochs=5, autocast=False, layers=2
):
    """The losses of a training, and its cache. change: is called before each epoch."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = make_policy("static", layers=layers)
    controller = FreezeController(model, optimizer, policy, total_steps=999, say=None)
    cache = FeatureCache(controller)
    losses = []
    for epoch in range(epochs):
        change(model, epoch)
        for ids in torch.arange(SAMPLES).split(size):
            torch.manual_seed(epoch)
            with cache.batch(ids) if cached else torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    out = loss_of(model, rows[ids], epoch)
                loss = out(TARGET[ids]) if callable(out) else F.cross_entropy(out.float(), TARGET[ids])
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, cache


def check(make, loss_of=lambda model, x, epoch: model(x), rel=1e-5, **options):
    """Compare the losses with and without a cache. Returns the cache."""
    expected, _ = trained(make, False, loss_of, **options)
    found, cache = trained(make, True, loss_of, **options)
    assert found == pytest.approx(expected, rel=rel)
    return cache


def switched(model, epoch):
    model.early = epoch >= 2


def with_aux(model, x, epoch):
    out, other = model(x)
    return lambda target: F.cross_entropy(out, target) + 0.4 * F.cross_entropy(other, target)


def test_a_head_that_only_a_training_has():
    cache = check(Deep, with_aux)
    assert (cache.reason, cache.kept, cache.hits) == ("", ("first", "second"), 12)


@pytest.mark.parametrize("epochs", [{2}, {2, 3, 4}])
def test_an_argument_that_asks_for_features(epochs):
    def loss_of(model, x, epoch):
        if epoch not in epochs:
            return model(x, False)
        out, (early,) = model(x, True)
        return lambda target: F.cross_entropy(out, target) + early.square().mean()

    cache = check(OnRequest, loss_of)
    assert cache.reason == ""
    assert cache.hits >= 9


@pytest.mark.parametrize("make", [Network, Normed])
def test_an_attribute_that_asks_for_features(make):
    cache = check(make, change=switched)
    assert cache.reason == ""
    assert cache.kept[0] == "first"
    assert cache.hits >= 7


def test_one_batch_that_takes_another_branch_costs_no_features():
    cache = check(Branching, size=10)
    assert (cache.reason, cache.kept) == ("", ("second",))
    assert cache.hits == 12


def test_what_may_be_read_for_other_numbers_is_kept():
    def change(model, epoch):
        model.limit = 9.0 if epoch < 3 else -9.0

    assert check(ByNumbers, change=change).kept[0] == "first"


@pytest.mark.parametrize("autocast", [False, True])
def test_writes_to_what_is_skipped_and_to_views_of_it(autocast):
    cache = check(InPlace, change=switched, autocast=autocast, rel=1e-2 if autocast else 1e-5)
    assert cache.hits >= 7


@pytest.mark.parametrize(
    "read", [lambda early: early.square().mean(), lambda early: torch.tensor(sum(early.tolist()[0]))]
)
def test_what_is_left_in_a_module_may_be_read_after_the_pass(read):
    def loss_of(model, x, epoch):
        out = model(x)
        return lambda target: F.cross_entropy(out, target) + (0 if model.left is None else read(model.left))

    assert check(Leaving, loss_of, change=switched).hits >= 5


@pytest.mark.parametrize("make", [Buffering, Averaging])
def test_what_is_left_in_a_buffer(make):
    def loss_of(model, x, epoch):
        out = model(x)
        return lambda target: F.cross_entropy(out, target) + (model.kept.square().mean() if epoch > 3 else 0)

    check(make, loss_of, change=switched, epochs=6)


def test_features_in_an_object_of_the_users_own():
    def loss_of(model, x, epoch):
        out, features = model(x)
        return lambda target: F.cross_entropy(out, target) + features.maps[0].square().mean()

    assert check(Boxed, loss_of).reason == ""


def test_a_mask_that_only_later_batches_need():
    cache = check(Text, rows=TOKENS)
    assert (cache.reason, cache.hits) == ("", 12)


def test_what_no_pass_shows_that_looks_for_a_cut_is_kept_once_it_was_read():
    class Hidden(Network):
        """Leaves features where gradients are recorded."""

        def finish(self, early, late):
            self.left = early if torch.is_grad_enabled() else None
            return self.head(late.relu())

    def loss_of(model, x, epoch):
        out = model(x)
        return lambda target: F.cross_entropy(out, target) + model.left.mean()

    cache = check(Hidden, loss_of)
    assert (cache.reason, cache.kept) == ("", ("first", "second"))
    assert cache.hits >= 9


def test_what_is_read_of_the_whole_batch_is_computed_of_the_whole_batch():
    class Mixed(Network):
        """Reads what depends on the whole batch."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8, affine=False, track_running_stats=False)

        def forward(self, x):
            early = self.first(x)
            normed = self.norm(early) if self.training and self.early else early
            return self.finish(normed, self.third(self.second(early).relu()))

    cache = check(Mixed, change=switched)
    assert (cache.reason, cache.kept) == ("", ("first", "second"))


class Doubled(Network):
    """Writes to what a skipped layer gives, before the next one is called."""

    def forward(self, x):
        early = self.first(x)
        early.mul_(2.0)
        return self.finish(early, self.third(self.second(early).relu()))


class OverwrittenByModule(Network):
    """A module writes to what a layer gave, and the model reads both that and a copy from before."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        early = self.first(x)
        before = early.clone()
        late = self.third(self.second(self.act(early)).relu())
        return self.finish(early + before, late)


class SameTensor(Network):
    """A module returns what it is given, and the model writes to that."""

    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x):
        early = self.first(x)
        self.same(early).mul_(2.0)
        return self.finish(early, self.third(self.second(early).relu()))


class WithView(Network):
    """A layer returns a view of its output too, and the model writes to that."""

    class Pair(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out, out[:, :4]

    def __init__(self):
        super().__init__()
        self.first = self.Pair(6, 8)

    def forward(self, x):
        early, half = self.first(x)
        half.mul_(3.0)
        return self.finish(early, self.third(self.second(early).relu()))


class Rescaling(Network):
    """Changes a buffer, and a parameter that does not train, after it has used them with what is skipped."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.factor = nn.Parameter(torch.ones(8), requires_grad=False)

    def finish(self, early, late):
        if self.early:
            scaled = early * self.scale * self.factor
            self.scale.mul_(0.5).add_(0.6)
            self.scale.data.mul_(1.1)
            with torch.no_grad():
                self.factor.mul_(0.9)
            late = late + scaled
        return self.head(late.relu())


class Products(Network):
    """Multiplies by vectors, for which torch changes shapes in place, and does so itself."""

    def finish(self, early, late):
        if self.early:
            late = late + early.mean(0) @ (early.t() @ early)
            late = late + early.sum(0).unsqueeze_(0) + (torch.fft.fft(early).conj() * 1j).real
            assert f"{early.mean():.3f}"
        return self.head(late.relu())


class ReadInTurn(Network):
    """Reads what one skipped layer gives before the next one is called, and then what that gives."""

    def forward(self, x):
        early = self.first(x).relu()
        factor = float(early.mean()) if self.early else 1.0
        middle = self.second(early).relu()
        return self.finish(middle * factor, self.third(middle))


class Transposed(Network):
    """Its first module returns a tensor that lies otherwise in memory."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            return self.linear(x).view(-1, 4, 2).transpose(1, 2)

    def __init__(self):
        super().__init__()
        self.first = self.Turned()

    def forward(self, x):
        early = self.first(x)
        late = self.third(self.second(early.reshape(len(x), 8).relu()).relu())
        return self.finish(early.transpose(1, 2).view(len(x), 8), late)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    "make", [Doubled, OverwrittenByModule, SameTensor, WithView, Rescaling, Products, ReadInTurn, Transposed]
)
def test_what_is_read_is_what_it_would_have_been(make, layers):
    check(make, change=switched, layers=layers)


def test_what_is_kept_of_a_pass_does_not_keep_its_batch():
    batches = []

    class Logging(Network):
        def __init__(self):
            super().__init__()
            self.log = []

        def finish(self, early, late):
            if self.early:
                self.log.append(early.detach().mean())
            return self.head(late.relu())

    def loss_of(model, x, epoch):
        batches.append(weakref.ref(x))
        return model(x)

    gc.disable()
    try:
        trained(Logging, True, loss_of, change=switched, epochs=20)
        assert sum(batch() is not None for batch in batches) <= 2
    finally:
        gc.enable()


def test_a_stand_in_is_copied_and_written_to_files_as_what_it_stands_for():
    def loss_of(model, x, epoch):
        out = model(x)
        if model.left is not None:
            file = io.BytesIO()
            torch.save(model.left, file)
            file.seek(0)
            expected = model.first(x).relu()
            for each in (copy.deepcopy(model.left), torch.load(file), torch.from_numpy(model.left.numpy())):
                assert type(each) is torch.Tensor
                assert torch.equal(each, expected)
        return out

    check(Leaving, loss_of, change=switched)


def test_a_model_that_writes_to_its_inputs_and_reads_what_is_skipped_is_told():
    class Centering(Network):
        def forward(self, x):
            x -= 0.5
            return super().forward(x)

    with pytest.raises(RuntimeError, match="writes to its inputs"):
        trained(Centering, True, lambda model, x, epoch: model(x.clone()), change=switched)

"""Where a frozen prefix is cut off: what is given, what only seems to happen, and what runs."""

import pytest
import torch
from torch import nn

from predictor import FreezeController, make_policy
from predictor.cache.feature_cache import FeatureCache
from predictor.cache.store import FeatureStore
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 12 * 64).reshape(12, 64).sin()


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Residual(nn.Module):
    """Three layers with a connection around them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Counted(64, 64), nn.ReLU(), Counted(64, 64), nn.ReLU(), Counted(64, 64))

    def forward(self, x):
        return x + self.layers(x)


class Side(nn.Module):
    """A connection around the whole prefix, which no single output replaces."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.head = (Counted(64, 64) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.left(x) * torch.tanh(self.right(x)))


class Overwritten(nn.Module):
    """What the first layer gave is written to: it cannot be kept, but need not be computed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (Counted(64, 64) for _ in range(3))

    def forward(self, x):
        return self.head(self.second(self.first(x).relu_()))


class Guarded(nn.Module):
    """Refuses features that are no numbers, as those of a layer that a cut skips."""

    def __init__(self, refuse):
        super().__init__()
        self.first, self.second, self.head = (Counted(64, 64) for _ in range(3))
        self.refuse = refuse

    def forward(self, x):
        features = self.first(x)
        if not torch.isfinite(features).all():
            self.refuse()
        return self.head(self.second(features) + features)


def cached(model, layers):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = make_policy("static", layers=layers)
    return FeatureCache(FreezeController(model, optimizer, policy, total_steps=999, say=None))


def run(model, cache, ids):
    with cache.batch(ids):
        return model(X[ids])


@pytest.mark.parametrize(
    ("make", "layers", "kept", "computed"),
    [
        (lambda: nn.Sequential(Residual(), Residual(), nn.Linear(64, 3)), 4, ("0", "1.layers.1"), 2),
        (lambda: nn.Sequential(Residual(), Residual(), nn.Linear(64, 3)), 5, ("0", "1.layers.3"), 1),
        (lambda: nn.Sequential(Residual(), Residual(), nn.Linear(64, 3)), 3, ("0",), 3),
        (Side, 3, ("left", "right"), 1),
        (Overwritten, 2, ("second",), 1),
    ],
)
def test_no_more_is_computed_or_kept_than_is_needed(make, layers, kept, computed):
    torch.manual_seed(0)
    model = make()
    cache = cached(model, layers)
    run(model, cache, torch.arange(12))
    assert (cache.kept, cache.cut, cache.reason) == (kept, kept[0], "")
    counted = [module for module in model.modules() if isinstance(module, Counted)]
    before = sum(module.calls for module in counted)
    mixed = torch.tensor([7, 0, 11, 3])
    hit = run(model, cache, mixed)
    assert sum(module.calls for module in counted) - before == computed
    assert cache.hits == 1
    assert torch.allclose(hit, model(X[mixed]), rtol=1e-6)
    assert cache.bytes == 12 * (len(kept) * 64 * 4 + 4)


def refuse_by_assertion():
    raise AssertionError


def refuse_by_value():
    raise ValueError("no numbers")


@pytest.mark.parametrize("refuse", [refuse_by_assertion, refuse_by_value])
def test_a_model_that_refuses_stand_ins_is_cut_where_it_sees_none(refuse):
    torch.manual_seed(0)
    model = Guarded(refuse)
    cache = cached(model, 2)
    expected = model(X)
    for _ in range(2):
        assert torch.equal(run(model, cache, torch.arange(12)), expected)
    assert (cache.kept, cache.hits, cache.reason) == (("first", "second"), 1, "")


def test_a_prefix_that_grows_inside_a_block_is_filled_from_the_old_features():
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), Residual(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = FreezeController(model, optimizer, Script({0: range(4), 1: range(5)}), total_steps=999, say=None)
    cache = FeatureCache(controller)
    expected = run(model, cache, torch.arange(12))
    run(model, cache, torch.arange(12))
    controller.step()
    first = run(model, cache, torch.arange(12))
    calls = model[0].layers[0].calls
    assert torch.equal(first, expected)
    assert torch.equal(run(model, cache, torch.arange(12)), expected)
    assert (cache.kept, cache.hits) == (("0", "1.layers.3"), 3)
    assert model[0].layers[0].calls == calls
    assert len(cache._levels) == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_features_come_back_in_their_memory_format(monkeypatch, memory_format, block_bytes):
    monkeypatch.setattr("predictor.cache.store._BLOCK_BYTES", block_bytes)
    images = torch.rand(6, 3, 4, 5).contiguous(memory_format=memory_format)
    sequences = torch.rand(6, 7, 2).transpose(1, 2)
    store = FeatureStore([images, sequences, torch.ones(6)], 1 << 20)
    assert store.fits([images[:2], sequences[:2], torch.ones(2)])
    store.put([5, 4, 3], [images[:3], sequences[:3], torch.ones(3)])
    store.put([1], [images[3:4], sequences[3:4], torch.zeros(1)])
    first, second, third = store.get([1, 3, 5], torch.device("cpu"))
    assert torch.equal(first, images[[3, 2, 0]])
    assert torch.equal(second, sequences[[3, 2, 0]])
    assert third.tolist() == [0, 1, 1]
    assert first.is_contiguous(memory_format=memory_format)
    assert second.transpose(1, 2).is_contiguous()


class Uneven(nn.Module):
    """A connection around the prefix that is there for batches of more than ten samples alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (Counted(64, 64) for _ in range(3))

    def forward(self, x):
        y = self.second(self.first(x))
        return self.head(y if len(x) <= 10 else y + self.first.weight.mean() * x)


class Attribute(nn.Module):
    """A large batch's features are made of what the first layer saw, which it hands on in an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (Keeping(64, 64) for _ in range(3))

    def forward(self, x):
        y = self.second(self.first(x))
        return self.head(y if len(x) <= 10 else y + self.first.seen)


class Keeping(nn.Linear):
    """A linear layer that remembers its input."""

    seen = None

    def forward(self, x):
        self.seen = x
        return super().forward(x)


@pytest.mark.parametrize(("kind", "works"), [(Uneven, True), (Attribute, False)])
def test_a_cut_that_is_right_for_few_samples_alone_is_not_taken(kind, works):
    model = kind()
    cache = cached(model, 2)
    expected = model(X)
    with cache.batch(range(12)):
        model(X)
    with cache.batch(range(12)):
        torch.testing.assert_close(model(X), expected)
    assert (cache.reason == "") == works

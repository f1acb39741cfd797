"""The feature cache in real loops: worker processes that load the samples, half precision, and padding."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from predictor import FreezeController, make_policy
from predictor.cache.feature_cache import FeatureCache
from predictor.errors import UsageError
from tests.predictor.counted import Counted, CountedConv, X, alike, cached, chain, run

SAMPLES, BATCH, EPOCHS = 24, 6, 3
FEATURES = 16


class Numbered(Dataset):
    """Samples with their ids, made anew each time one is asked for, and the worker that made them."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        x = torch.sin(torch.arange(64.0) * (i + 1)).reshape(1, 8, 8)
        worker = torch.utils.data.get_worker_info()
        return i, x, i % 3, -1 if worker is None else worker.id


def network():
    torch.manual_seed(0)
    prefix = [CountedConv(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, FEATURES), nn.ReLU()]
    return nn.Sequential(*prefix, nn.Linear(FEATURES, 8), nn.Linear(8, 3))


def train(loader, half, cached):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = EPOCHS * len(loader)
    controller = FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=steps, say=None)
    cache = FeatureCache(controller)
    losses, workers = [], set()
    for _ in range(EPOCHS):
        for ids, x, y, worker in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                with cache.batch(ids) if cached else contextlib.nullcontext():
                    logits = model(x)
                loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            workers |= set(worker.tolist())
    return model, cache, losses, workers


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_features_of_another_precision_are_not_used_after_a_resume(before, after):
    def run_all(model, cache, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return run(model, cache, torch.arange(12))

    model = chain()
    run_all(model, cache := cached(model), before)
    other = chain()
    resumed = cached(other)
    resumed.load_state_dict(cache.state_dict())
    resumed.load_state_dict(resumed.state_dict())  # also before it has seen a batch
    with torch.autocast("cpu", torch.bfloat16, enabled=after):
        alone = chain()(X)
    assert torch.equal(run_all(other, resumed, after), alone)
    assert resumed.hits == (before == after)
    assert torch.equal(run_all(other, resumed, after), alone)
    assert resumed.hits == 1 + (before == after)


def test_a_state_that_does_not_tell_the_precision_is_taken_as_it_is():
    model = chain()
    run(model, cache := cached(model), torch.arange(12))
    state = cache.state_dict()
    del state["autocast"]
    other = chain()
    resumed = cached(other)
    resumed.load_state_dict(state)
    run(other, resumed, torch.arange(12))
    assert resumed.hits == 1


@pytest.mark.parametrize(("workers", "half"), [(2, True), (0, False)])
def test_batches_from_worker_processes(workers, half):
    def loader():
        return DataLoader(
            Numbered(),
            batch_size=BATCH,
            shuffle=True,
            generator=torch.Generator().manual_seed(1),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    model, cache, losses, seen = train(loader(), half, cached=True)
    plain, _, expected, _ = train(loader(), half, cached=False)
    assert seen == set(range(workers) if workers else [-1])
    # Shuffled: a batch is a hit once each of its samples has come by, so every one after the first epoch.
    assert (cache.misses, cache.hits) == (SAMPLES // BATCH, (EPOCHS - 1) * SAMPLES // BATCH)
    assert losses == expected
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    # Half the bytes where the features are half as precise; and a number for each sample to know it by.
    assert cache.bytes == SAMPLES * (FEATURES * (2 if half else 4) + 4)
    assert plain[0].calls == EPOCHS * SAMPLES // BATCH
    assert model[0].calls < plain[0].calls


def test_features_of_another_precision_are_not_mixed_with_the_first():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=9, say=None)
    cache = FeatureCache(controller)
    loader = DataLoader(Numbered(), batch_size=SAMPLES)
    ids, x, _, _ = next(iter(loader))
    with torch.autocast("cpu", torch.bfloat16), cache.batch(ids[:12]):
        model(x[:12])
    with cache.batch(ids[12:]):
        assert torch.equal(model(x[12:]), model(x[12:]))
    assert cache.bytes == 12 * (FEATURES * 2 + 4)


def test_weights_that_are_loaded_in_between_make_it_forget():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(6))
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert alike(run(model, cache, torch.arange(6)), model(X[:6]))
    assert alike(run(model, cache, torch.arange(6)), model(X[:6]))
    assert (cache.hits, cache.misses) == (1, 2)


def test_weights_that_come_back_as_they_were_are_no_others():
    """As those of the training do after a test of their average."""
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(6))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict({name: 0.9 * value for name, value in weights.items()})
    model.load_state_dict(weights)
    assert alike(run(model, cache, torch.arange(6)), model(X[:6]))
    assert (cache.hits, cache.misses) == (1, 1)


class Mean(nn.Module):
    """The mean over a text's positions."""

    def forward(self, x):
        return x.mean(1)


def test_samples_that_come_in_another_length_run_as_ever():
    """As texts do that are padded to the longest of their batch; the values themselves stay."""
    torch.manual_seed(0)
    model = nn.Sequential(Counted(4, 8), nn.Tanh(), Counted(8, 8), Mean(), nn.Linear(8, 3))
    cache = cached(model, layers=2)
    long = torch.randn(6, 5, 4) * torch.tensor([1, 1, 1, 0, 0])[:, None]
    short = long[:, :3]

    def train(cache, x):
        with cache.batch(range(6)):
            return model(x)

    train(cache, long)
    calls = model[0].calls
    torch.testing.assert_close(train(cache, short), model(short))
    assert (cache.hits, cache.misses, model[0].calls) == (0, 2, calls + 2)
    torch.testing.assert_close(train(cache, long), model(long))
    assert cache.hits == 1
    state = cache.state_dict()
    cache._controller.release()
    resumed = cached(model, layers=2)
    resumed.load_state_dict(state)
    torch.testing.assert_close(train(resumed, short), model(short))
    torch.testing.assert_close(train(resumed, long), model(long))
    assert (resumed.hits, resumed.misses) == (2, 3)


def test_a_part_of_the_model_can_be_what_is_called():
    whole = nn.Sequential(chain(), nn.Identity())
    cache = cached(whole, model=whole[0])
    for _ in range(2):
        with cache.batch(range(4)):
            out = whole[0](X[:4])  # not `whole`
    assert (cache.hits, cache.misses) == (1, 1)
    assert whole[0][1].calls < whole[0][-1].calls
    assert torch.equal(out, whole(X[:4]))
    with pytest.raises(UsageError, match="model=Linear: this is no part of the Sequential"):
        cached(chain(), model=nn.Linear(1, 1))

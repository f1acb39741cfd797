"""Reading ahead: in a thread of its own, for the next batch alone, and without changing a number."""

import threading

import pytest
import torch

from predictor import FeatureCache, FreezeController
from predictor.cache.augmented import AugmentedCache
from predictor.cache.prefetch import ReadAhead
from predictor.cache.store import FeatureStore
from tests.predictor.counted import X, alike, cached, chain, run
from tests.predictor.scripted import Script

BATCHES = [torch.tensor(ids) for ids in ([3, 0, 7, 11], [1, 2, 8, 9], [4, 5, 6, 10])]


def failing():
    raise OSError(5, "Input/output error")


def test_what_was_read_is_handed_out_once_with_its_key():
    ahead = ReadAhead()
    assert ahead.take() == (None, [])
    rows = [torch.ones(2)]
    ahead.start("a", lambda: rows)
    ahead.start("b", lambda: rows)
    key, read = ahead.take()
    assert (key, read is rows) == ("b", True)
    assert ahead.take() == (None, [])


def test_what_reading_raises_is_raised_where_it_is_taken_and_not_where_it_is_dropped():
    ahead = ReadAhead()
    ahead.start("a", failing)
    with pytest.raises(OSError, match="Input/output error"):
        ahead.take()
    ahead.start("a", failing)
    ahead.drop()
    assert ahead.take() == (None, [])


def test_the_thread_ends():
    before = threading.active_count()
    ahead = ReadAhead()
    ahead.start("a", list)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


def train(cache, model, loader):
    outputs = []
    for ids, x in loader:
        with cache.batch(ids):
            outputs.append(model(x))
    return outputs


@pytest.mark.parametrize("kind", [FeatureCache, AugmentedCache])
def test_a_loader_read_ahead_gives_the_same_numbers_from_another_thread(kind, monkeypatch, tmp_path):
    threads, fetch = [], FeatureStore.fetch

    def noted(self, ids):
        threads.append(threading.current_thread().name.split("_")[0])
        return fetch(self, ids)

    monkeypatch.setattr(FeatureStore, "fetch", noted)
    loader = [(ids, X[ids]) for ids in BATCHES]
    results = []
    for early in (False, True):
        model = chain()
        controller = FreezeController(
            model, torch.optim.SGD(model.parameters(), lr=0.1), Script({0: {0, 1}}), total_steps=999, say=None
        )
        cache = kind(controller, memory_gb=0, directory=tmp_path)
        for _ in range(4):
            threads.clear()
            outputs = train(cache, model, cache.ahead(loader) if early else loader)
        results.append(outputs)
        cache.close()
        assert cache.bytes == 0
    assert all(map(torch.equal, *results))
    assert threads[0] == "MainThread"  # no batch came before the first
    assert threads.count("frozen-features") >= 2


def test_other_samples_than_were_read_are_read_then():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(12))
    cache.prefetch([0, 1])
    ids = torch.tensor([5, 4, 3])
    assert alike(run(model, cache, ids), model(X[ids]))
    cache.prefetch([0, 12])  # the second is not known: nothing is read
    assert cache._ahead.take() == (None, [])
    cache.prefetch(ids)
    cache.clear()
    assert alike(run(model, cache, ids), model(X[ids]))


def test_what_was_read_before_the_prefix_grew_is_dropped():
    model = chain()
    script = Script({0: {0}, 1: {0, 1}})
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), script, total_steps=999, say=None)
    cache = FeatureCache(controller)
    ids, expected = torch.arange(12), model(X)
    run(model, cache, ids)
    cache.prefetch(ids)
    controller.step()
    assert torch.equal(run(model, cache, ids), expected)
    assert (cache.cut, cache.taken) == ("4", {frozenset({0}): 12})

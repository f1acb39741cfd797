"""The feature cache where features, ids and samples lie on another device than the host."""

import warnings

import pytest
import torch
from torch import nn

from predictor import FeatureCache, FreezeController, make_policy

second = pytest.importorskip("tests.second_device")
ROWS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Its prefix gives a tensor on its device and one on the CPU."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x, lengths):
        return self.linear(x), 2 * lengths


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.prefix, self.middle, self.head = Mixed(), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, lengths):
        hidden, lengths = self.prefix(x, lengths)
        return self.head(self.middle(hidden.tanh()).tanh()) * lengths.to(hidden.device)[:, None]


def trained(on_device, epochs=4, ids_there=False, between=None, mixed=False, **options):
    """Outputs of a training in which nothing moves, the cache, and the host's waits in each pass."""
    with second.second_device() as syncs:
        torch.manual_seed(0)
        model = (
            Reader()
            if mixed
            else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        )
        rows, lengths = ROWS.clone(), torch.arange(24.0)
        if on_device:
            model, rows = model.to(second.NAME), rows.to(second.NAME)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        controller = FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=999, say=None)
        cache = FeatureCache(controller, **options)
        outputs, waits = [], []
        for epoch in range(epochs):
            if between is not None:
                between(model, rows, epoch)
            for start in range(0, 24, 6):
                ids = torch.arange(start, start + 6)
                args = (rows[start : start + 6], lengths[start : start + 6])[: 1 + mixed]
                key = ids.to(second.NAME) if ids_there else ids
                before, hits = syncs.count("predictor/cache"), cache.hits
                with cache.batch(key):
                    output = model(*args)
                if cache.hits > hits:
                    waits.append(syncs.count("predictor/cache") - before)
                output.mean().backward()
                controller.step()
                outputs.append(output.detach().cpu())
    return outputs, cache, waits


def alike(first, second):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


def of_hits(ids_there, device_gb, mixed):
    expected, _, _ = trained(False, mixed=mixed)
    outputs, cache, waits = trained(True, ids_there=ids_there, device_gb=device_gb, mixed=mixed)
    return alike(outputs, expected), cache.hits, cache.reason, waits


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("device_gb", [None, 0.0])
@pytest.mark.parametrize("ids_there", [False, True])
def test_a_hit_waits_for_the_device_once_at_most(on_second_device, ids_there, device_gb, mixed):
    right, hits, reason, waits = on_second_device(of_hits, ids_there, device_gb, mixed)
    assert (right, hits, reason) == (True, 12, "")
    assert sorted(waits)[5] <= ids_there  # those that are not checked on some samples
    assert max(waits) <= 1 + ids_there


def of_tiers():
    from predictor.cache import store

    store._BLOCK_BYTES = 6 * (8 * 4 + 4)  # of six rows: the first lies on the device, and the others in memory
    expected, _, _ = trained(False)
    outputs, cache, _ = trained(True, device_gb=store._BLOCK_BYTES / 1e9)
    level = cache._levels[-1]
    with second.second_device():
        both = level.store.get([2, 8, 3, 20])[0].cpu()
        same = torch.allclose(both, torch.cat([level.store.get([i])[0].cpu() for i in (2, 8, 3, 20)]))
    return alike(outputs, expected), same, cache.hits, level.store.device_bytes == store._BLOCK_BYTES


def test_beyond_the_device_features_lie_in_memory(on_second_device):
    assert on_second_device(of_tiers) == (True, True, 12, True)


def writes_to_a_sample(model, rows, epoch):
    if epoch == 3:
        rows[8] += 1


def writes_to_weights(model, rows, epoch):
    if epoch == 3:
        model[0].weight.data.mul_(2.0)


def moves(model, rows, epoch):
    if epoch == 3:
        model.to(torch.bfloat16).to(torch.float32)


def of_changes(between):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected, _, _ = trained(False, between=between, epochs=5)
        outputs, cache, _ = trained(True, between=between, epochs=5)
    wrong = [not torch.allclose(a, b, atol=1e-2) for a, b in zip(outputs, expected, strict=True)]
    return sum(wrong), wrong[-4:], cache.reason, [str(each.message) for each in caught]


def test_a_sample_that_changes_is_noticed_with_the_next_batch(on_second_device):
    wrong, last, reason, messages = on_second_device(of_changes, writes_to_a_sample)
    assert wrong <= 1
    assert last == [False] * 4
    assert "is not what it was" in reason
    assert any("trained on" in message for message in messages)


def test_weights_written_to_behind_pytorch_s_back_are_noticed_with_the_next_batch(on_second_device):
    wrong, last, reason, _ = on_second_device(of_changes, writes_to_weights)
    assert wrong <= 1
    assert last == [False] * 4
    assert reason == ""


def test_a_model_that_is_converted_there_keeps_its_features_anew(on_second_device):
    wrong, _, reason, _ = on_second_device(of_changes, moves)
    assert (wrong, reason) == (0, "")


def of_moving():
    """A model that is moved to the device after its cache was made and filled."""
    with second.second_device(), torch.no_grad():  # no graph may hold the weights, which are exchanged here
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        expected = model(ROWS)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        controller = FreezeController(model, optimizer, make_policy("static", layers=1), total_steps=99, say=None)
        cache, outputs = FeatureCache(controller), []
        for device in ("cpu", "cpu", second.NAME, second.NAME):
            model.to(device)
            with cache.batch(range(24)):
                outputs.append(model(ROWS.to(device)).detach().cpu())
    return all(torch.allclose(each, expected, atol=1e-6) for each in outputs), cache.hits, cache.reason


def test_a_model_may_be_moved_after_its_cache_was_filled(on_second_device):
    assert on_second_device(of_moving) == (True, 2, "")

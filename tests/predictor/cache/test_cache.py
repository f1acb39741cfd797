"""The feature cache skips the frozen prefix and changes nothing."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor.errors import UsageError
from tests.predictor.counted import COMPUTED, Counted, X, Y, alike, cached, chain, run


def gradients(model, output, ids):
    model.zero_grad()
    F.cross_entropy(output, Y[ids]).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_hit_gives_the_same_outputs_and_gradients_and_skips_the_prefix():
    model = chain()
    cache = cached(model)
    ids = torch.arange(12)
    run(model, cache, ids)
    mixed = torch.tensor([7, 0, 11, 3, 5])  # another order, another size
    calls = model[1].calls
    hit = run(model, cache, mixed)
    assert (cache.cut, cache.reason, cache.hits, cache.misses) == ("4", "", 1, 1)
    assert model[1].calls == calls
    assert alike(hit, model(X[mixed]))
    assert all(map(alike, gradients(model, hit, mixed), gradients(model, model(X[mixed]), mixed)))


def test_the_model_is_left_as_it_was():
    model = chain()
    cache = cached(model)
    for _ in range(2):
        run(model, cache, torch.arange(4))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_batch_of_which_little_is_known_runs_the_prefix():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(6))
    run(model, cache, torch.arange(5, 8))
    assert (cache.hits, cache.misses, cache.taken) == (0, 2, {None: 3})
    run(model, cache, torch.arange(8))
    assert (cache.hits, cache.taken) == (1, {frozenset({0, 1}): 8})


def test_of_a_batch_that_is_mostly_known_the_prefix_is_run_on_the_others_alone():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(6))
    mixed = torch.tensor([7, 3, 0, 6, 5, 4])
    COMPUTED.clear()
    hit = run(model, cache, mixed)
    assert [rows for layer, rows in COMPUTED if layer is model[1]] == [4, 2]  # to check those known, and on 7 and 6
    assert (cache.hits, cache.misses, cache.taken) == (1, 1, {frozenset({0, 1}): 4, None: 2})
    assert alike(hit, model(X[mixed]))
    assert all(map(alike, gradients(model, hit, mixed), gradients(model, model(X[mixed]), mixed)))
    COMPUTED.clear()
    run(model, cache, mixed)
    # Twice to see that no feature hangs on the count of calls, which has changed. And some, where they come again.
    assert [rows for layer, rows in COMPUTED if layer is model[1]] == [6, 6, 2]
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


def test_completing_a_batch_touches_neither_statistics_nor_random_numbers():
    model = nn.Sequential(
        nn.Flatten(), Counted(64, 8), nn.ReLU(), Counted(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    batches = [torch.arange(6), torch.arange(8), torch.arange(1, 9)]
    outputs = []
    for use in (False, True):
        torch.manual_seed(0)
        own = copy.deepcopy(model)
        cache = cached(own, layers=1)
        outputs.append([run(own, cache, ids) if use else own(X[ids]) for ids in batches])
    assert (cache.cut, cache.hits, cache.taken) == ("2", 2, {frozenset({0}): 7, None: 1})
    for without, with_cache in zip(*outputs, strict=True):
        assert torch.allclose(without, with_cache, atol=1e-4)


class Skip(nn.Module):
    """A residual block: its input is needed after its first layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Counted(8, 8), Counted(8, 8)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def test_a_prefix_that_ends_inside_a_residual_block_is_cut_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Counted(64, 8), Skip(), Counted(8, 3))
    cache = cached(model, layers=2)  # the block's first layer is frozen, its second trains
    run(model, cache, torch.arange(12))
    assert cache.cut == "1"
    assert alike(run(model, cache, torch.arange(5)), model(X[:5]))
    assert cache.hits == 1


class InPlace(nn.Module):
    """What the frozen layer gave is written to afterwards, and its other input comes from further ahead."""

    def __init__(self):
        super().__init__()
        self.stem, self.main, self.side, self.head = (nn.Linear(n, 8) for n in (64, 8, 8, 8))

    def forward(self, x):
        x = self.stem(x.flatten(1))
        out = self.main(x)
        out += self.side(x)
        return self.head(out.relu_())


def test_outputs_that_are_written_to_later_are_not_taken_for_features():
    torch.manual_seed(0)
    model = InPlace()
    with torch.no_grad():
        model.side.bias.zero_()  # so that a stand-in of zeros would have passed for the real thing
    cache = cached(model, layers=2)
    run(model, cache, torch.arange(12))
    assert cache.cut == "stem"
    assert alike(run(model, cache, torch.arange(12)), model(X))


class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.prefix = nn.Sequential(self.first)

    def forward(self, x):
        return self.head(self.prefix(F.dropout(x.flatten(1), 0.5, self.training)))


def test_a_prefix_that_is_random_in_training_is_left_alone_with_the_reason():
    model = Restless()
    cache = cached(model, layers=1)
    for _ in range(2):
        run(model, cache, torch.arange(12))
    assert "other features in training than in evaluation" in cache.reason
    assert (cache.hits, cache.bytes) == (0, 0)


class Functional(nn.Module):
    """Its layers are used without a call of their modules."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(F.linear(x.flatten(1), self.first.weight), self.head.weight)


def test_where_nothing_can_be_cut_the_cache_is_off_and_training_goes_on():
    model = Functional()
    cache = cached(model, layers=1)
    outputs = [run(model, cache, torch.arange(12)) for _ in range(2)]
    assert torch.equal(*outputs)
    assert "no module ends before" in cache.reason
    assert cache.misses == 2


def test_nothing_frozen_means_nothing_kept():
    model = chain()
    cache = cached(model, layers=0)
    run(model, cache, torch.arange(12))
    assert (cache.reason, cache.bytes) == ("nothing is frozen yet", 0)


def test_under_random_augmentation_the_cache_is_off_and_the_training_goes_on():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(12))
    changed = torch.stack([X[0], X[1].flip(-1)])
    with pytest.warns(UserWarning, match=r"sample 1 is not what it was .* random augmentation"), cache.batch([0, 1]):
        assert alike(model(changed), expected := model(changed))
    with cache.batch([0, 1]):
        assert alike(model(changed), expected)
    assert "sample 1" in cache.reason
    assert (cache.hits, cache.bytes) == (0, 0)
    first_time = cached(chain(), check_inputs=False)
    model = first_time._model
    first = run(model, first_time, torch.arange(12))
    with first_time.batch([0, 1]):
        assert alike(model(X[:2].flip(-1)), first[:2])


def test_beyond_the_memory_budget_features_lie_in_files_that_have_no_name(tmp_path):
    model = chain()
    cache = cached(model, memory_gb=0, directory=tmp_path)
    run(model, cache, torch.arange(12))
    assert alike(run(model, cache, torch.tensor([9, 2])), model(X[[9, 2]]))
    assert cache.hits == 1
    assert cache.bytes == 12 * (8 * 4 + 4)
    assert list(tmp_path.iterdir()) == []


def test_many_blocks_give_rows_in_the_order_asked_for(monkeypatch):
    monkeypatch.setattr("predictor.cache.store._BLOCK_BYTES", 2 * (8 * 4 + 4))  # two rows a block
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(12))
    mixed = torch.tensor([11, 0, 4, 5, 10, 1])
    assert alike(run(model, cache, mixed), model(X[mixed]))


def test_where_no_call_takes_a_part_of_the_disk_zeros_do(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    model = chain()
    cache = cached(model, memory_gb=0, directory=tmp_path)
    run(model, cache, torch.arange(12))
    assert alike(run(model, cache, torch.tensor([9, 2])), model(X[[9, 2]]))
    assert cache.hits == 1


def test_a_full_disk_switches_the_cache_off_and_training_goes_on(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = chain()
    cache = cached(model, memory_gb=0, directory=tmp_path)
    outputs = [run(model, cache, torch.arange(12)) for _ in range(2)]
    assert torch.equal(*outputs)
    assert cache.reason == "features could not be kept: No space left on device"


def test_batchnorm_and_dropout_of_frozen_layers_stand_still_and_the_rest_of_them_live_on(make_toy):
    model = make_toy()
    cache = cached(model, layers=2)
    run(model, cache, torch.arange(12))
    random = torch.get_rng_state()
    before = model.body[4].running_mean.clone()
    run(model, cache, torch.arange(12))
    assert cache.hits == 1
    assert torch.equal(before, model.body[4].running_mean)
    assert torch.equal(random, torch.get_rng_state())


def test_looking_for_a_cut_leaves_training_mode_statistics_and_random_numbers_alone(make_toy):
    plain, watched = make_toy(), make_toy()
    cache = cached(watched, layers=1)
    cached(plain, layers=1)
    results = []
    for model, context in ((plain, None), (watched, cache)):
        torch.manual_seed(1)
        results.append(run(model, context, torch.arange(12)) if context else model(X))
    assert torch.equal(*results)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert [m.training for m in plain.modules()] == [m.training for m in watched.modules()]


def test_under_autocast_features_are_kept_in_its_precision():
    model = chain()
    cache = cached(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, cache, torch.arange(12))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, model(X))
    assert cache.hits == 1


def test_wrong_use_is_refused():
    model = chain()
    cache = cached(model)
    with pytest.raises(UsageError, match="no tensor with 5 rows"), cache.batch(range(5)):
        model(X)
    with pytest.raises(UsageError, match="memory_gb=-1"):
        cached(chain(), memory_gb=-1)


class Prefix(nn.Module):
    """Leaves a part of what it makes in an attribute, which is how some models hand it past other layers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 8)
        self.aside = None

    def forward(self, x):
        out = self.layer(x.flatten(1))
        self.aside = out.tanh()
        return out


class Handing(nn.Module):
    """A prefix, a layer that trains, and the head, which takes what the prefix has left aside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prefix, self.middle, self.head = Prefix(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.middle(self.prefix(x)).relu() + self.prefix.aside)


def test_what_is_handed_on_in_an_attribute_is_never_that_of_another_batch():
    model = Handing()
    cache = cached(model, layers=1)
    first, second = torch.arange(6), torch.arange(6, 12)
    expected = model(X)
    for ids in (first, second, first, second):
        assert alike(run(model, cache, ids), expected[ids])

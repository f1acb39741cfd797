"""The feature cache while the prefix grows and shrinks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from predictor import FeatureCache, FreezeController, make_policy
from tests.predictor.counted import COMPUTED, Counted, X, Y, alike, chain, run
from tests.predictor.scripted import Script

GROWING = {step: range(step + 1) for step in range(3)}


def test_a_prefix_that_grows_is_filled_from_the_old_features_and_one_that_shrinks_forgets():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = FreezeController(model, optimizer, Script({0: {0}, 1: {0, 1}, 3: {0}}), total_steps=999)
    cache = FeatureCache(controller)
    ids = torch.arange(12)
    expected = model(X)
    run(model, cache, ids)
    assert cache.cut == "2"
    controller.step()
    inputs_run = model[1].calls
    first = run(model, cache, ids)
    assert (cache.cut, model[1].calls) == ("4", inputs_run)
    second_layer = model[3].calls
    second = run(model, cache, ids)
    assert model[3].calls == second_layer
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert len(cache._levels) == 1  # the old features have served
    controller.step()
    controller.step()
    assert cache.bytes == 0
    run(model, cache, ids)
    assert cache.cut == "2"


def test_a_prefix_that_grows_before_its_features_are_complete_is_filled_from_where_most_are():
    model = chain()
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), Script(GROWING), total_steps=999)
    cache = FeatureCache(controller)
    first, second = torch.arange(6), torch.arange(6, 12)
    expected = model(X)
    for ids in (first, second):
        run(model, cache, ids)
    for cut in ("4", "5"):
        controller.step()
        misses, calls = cache.misses, model[1].calls
        assert alike(run(model, cache, first), expected[first])
        assert (cache.cut, cache.misses) == (cut, misses)
        assert model[1].calls == calls
    # The second half is known at the first cut alone, and starts there.
    calls = model[1].calls
    assert alike(run(model, cache, second), expected[second])
    assert model[1].calls == calls
    run(model, cache, second)
    assert len(cache._levels) == 1  # the old features have served


def test_a_pass_says_what_was_frozen_when_its_features_were_found():
    model = chain()
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.1), Script(GROWING), total_steps=999)
    cache = FeatureCache(controller)
    taken = []
    for ids in (range(12), range(6), range(6), range(6)):
        if len(taken) == 2:
            controller.step()
        run(model, cache, torch.tensor(ids))
        taken.append(cache.taken)
    # The third pass begins from the features of the first cut, and keeps those of the second.
    assert taken == [{None: 12}, {frozenset({0}): 6}, {frozenset({0}): 6}, {frozenset({0, 1}): 6}]


def test_a_prefix_that_grows_a_little_is_cut_anew_once_its_features_have_been_of_use():
    model = nn.Sequential(nn.Flatten(), *(Counted(64, 64) for _ in range(6)))
    script = Script({0: range(3), 1: range(4)})
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), script, total_steps=999, say=None)
    cache = FeatureCache(controller)
    first, second = torch.arange(6), torch.arange(6, 12)
    run(model, cache, first)
    controller.step()
    calls = model[1].calls
    run(model, cache, second)  # still being filled
    assert (cache.cut, model[1].calls) == ("3", calls + 1)
    run(model, cache, first)
    assert (cache.cut, cache.taken) == ("3", {frozenset(range(3)): 6})
    expected = model(X)
    assert alike(run(model, cache, second), expected[second])
    assert cache.cut == "4"
    run(model, cache, first)
    run(model, cache, torch.arange(12))
    assert cache.taken == {frozenset(range(4)): 12}


@pytest.mark.parametrize(("total_steps", "cut"), [(51, "3"), (52, "4")])
def test_a_prefix_is_not_cut_anew_where_too_little_is_left_for_that_to_pay(total_steps, cut):
    model = nn.Sequential(nn.Flatten(), *(Counted(64, 64) for _ in range(6)))
    optimizer, script = torch.optim.SGD(model.parameters(), lr=0.0), Script({0: range(3), 1: range(4)})
    controller = FreezeController(model, optimizer, script, total_steps=total_steps, say=None)
    cache = FeatureCache(controller)
    for _ in range(2):
        run(model, cache, torch.arange(12))
    controller.step()
    expected = model(X)
    for _ in range(2):
        torch.testing.assert_close(run(model, cache, torch.arange(12)), expected)
    # To look takes two passes, and a dozen on eight of twelve samples: ten. One layer of five is spared in each pass
    # that is left but for one, in which the new cut is filled: a new cut pays if fifty are.
    assert cache.cut == cut


def test_a_batch_is_completed_from_the_old_features_where_they_are_known():
    model = chain()
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), Script(GROWING), total_steps=999)
    cache = FeatureCache(controller)
    run(model, cache, torch.arange(12))
    controller.step()
    run(model, cache, torch.arange(8))
    expected = model(X)
    COMPUTED.clear()
    assert torch.allclose(run(model, cache, torch.arange(2, 11)), expected[2:11], rtol=1e-6)
    assert cache.taken == {frozenset({0}): 3, frozenset({0, 1}): 6}
    # Twice to see that no feature hangs on the count of calls. To check those known, and the others.
    assert [rows for layer, rows in COMPUTED if layer is model[3]] == [9, 9, 6, 3]


def test_old_features_are_completed_from_the_inputs_and_not_from_what_lies_behind_them():
    model = chain()
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), Script(GROWING), total_steps=999)
    cache = FeatureCache(controller)
    expected = model(X)
    run(model, cache, torch.arange(6))
    controller.step()
    run(model, cache, torch.tensor([0]))
    run(model, cache, torch.arange(9, 12))  # kept at the new cut alone
    assert cache.taken == {None: 3}
    mixed = torch.tensor([1, 2, 3, 4, 9, 10])
    assert torch.allclose(run(model, cache, mixed), expected[mixed], rtol=1e-6)
    assert cache.taken == {frozenset({0}): 4, None: 2}
    assert torch.allclose(run(model, cache, mixed), expected[mixed], rtol=1e-6)


def test_features_of_a_layer_that_somebody_else_has_moved_are_forgotten():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=9)
    cache = FeatureCache(controller)
    run(model, cache, torch.arange(12))
    model[1].weight.requires_grad_(True)  # the user's code
    with cache.batch(torch.arange(12)):
        loss = F.cross_entropy(model(X), Y)
    assert "trained again" in cache.reason
    with pytest.warns(UserWarning, match="back on"):  # the pass was whole, and so a gradient arrives
        loss.backward()
    with torch.no_grad():
        model[1].weight.add_(1.0)
    optimizer.step()
    controller.step()
    optimizer.zero_grad()
    assert cache.bytes == 0
    again = run(model, cache, torch.arange(12))
    assert torch.equal(again, model(X))
    assert torch.equal(run(model, cache, torch.arange(12)), model(X))


class Checkpointed(nn.Module):
    """Two layers that the backward pass computes once more."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return checkpoint(lambda x: self.second(self.first(x).relu()), x, use_reentrant=False)


def test_no_cut_is_taken_inside_what_the_backward_pass_computes_once_more():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Checkpointed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = FeatureCache(FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=9))
    for _ in range(3):
        out = run(model, cache, torch.arange(12))
        optimizer.zero_grad()
        F.cross_entropy(out, Y).backward()
        assert torch.isfinite(model[2].second.weight.grad).all()
    assert "activations are checkpointed" in cache.reason


Linear = partial(nn.Linear, 64, 64)


class Block(nn.Module):
    """Has a layer before the cut and one behind it. Held in evaluation mode once both are frozen."""

    def __init__(self):
        super().__init__()
        self.early, self.norm, self.late, self.drop = Linear(), nn.BatchNorm1d(64), Linear(), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.late(self.norm(self.early(x))))


@pytest.mark.parametrize("block", [Block, lambda: nn.Sequential(Linear(), nn.Tanh(), Linear())])
def test_a_module_around_the_cut_that_is_held_later_is_no_change_of_what_lies_before_it(block):
    def checked(later):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), block(), nn.Linear(64, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        script = Script({0: {0}, 6: later})
        controller = FreezeController(model, optimizer, script, total_steps=16, say=None)
        cache = FeatureCache(controller)
        for step in range(16):
            run(model, cache, torch.arange(12)[6 * (step % 2) :][:6])
            controller.step()
        assert (cache.reason, controller.frozen) == ("", frozenset(later))
        return cache.checked

    assert checked({0, 1}) == checked({0}) > 0

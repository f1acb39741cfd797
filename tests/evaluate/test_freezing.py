"""Training with the frozen front's features kept: the same numbers as without, and counts that add up."""

import pytest
import torch

from collect.train import train
from collect.workloads import load_workload
from evaluate.freezing import CacheHook, FreezeHook
from predictor.policies import make_policy
from tests.evaluate import toys


def run(workload, policy, cached=True, stop_at=None, checkpoint=None, **options):
    freezing = FreezeHook(make_policy(policy, **options))
    caching = CacheHook(freezing)
    hooks = (freezing, caching, toys.StopAt(stop_at)) if cached else (freezing, toys.StopAt(stop_at))
    return train(workload, seed=3, device="cpu", hooks=hooks, checkpoint=checkpoint), caching


def small_resnet(**recipe):
    settings = {"epochs": 6, "batch_size": 20, "train_samples": 120, **recipe}
    return load_workload("resnet8-digits").with_recipe(**settings)


@pytest.mark.parametrize(("policy", "options"), [("static", {"share": 0.5}), ("linear", {"start": 0, "level": 0.3})])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cached_training_ends_where_one_without_ends(policy, options, accumulate):
    """Shuffled samples, BatchNorm behind the front. Kept features may be rounded otherwise than fresh ones, by 1e-6;
    a few steps make at most 1e-4 of that.
    """
    workload = small_resnet(accumulate=accumulate)
    plain, _ = run(workload, policy, cached=False, **options)
    cached, caching = run(workload, policy, **options)
    assert caching.hits.total() > 0
    assert caching.cache.reason == ""
    assert caching.hits.total() + caching.misses == cached.step * accumulate == 36
    for ours, theirs in zip(cached.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [row["test_accuracy"] for row in cached.curve] == [row["test_accuracy"] for row in plain.curve]
    losses = [[row["train_loss"] for row in training.curve] for training in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_front_that_grows_begins_from_its_old_features_at_first():
    _, caching = run(toys.six_linear().with_recipe(epochs=12), "linear", start=0.0)
    assert all(under <= frozen for frozen, under in caching.hits)
    assert any(under < frozen for frozen, under in caching.hits)
    assert any(under == frozen for frozen, under in caching.hits)


def test_a_step_that_was_not_taken_is_not_counted():
    training, caching = run(toys.six_linear().with_recipe(lr=1e30), "static", layers=1)
    assert training.status == "diverged"
    assert caching.hits.total() + caching.misses == training.step < 20


def test_a_cached_training_goes_on_from_its_checkpoint(tmp_path):
    whole, unbroken = run(toys.six_linear(), "static", layers=2)
    run(toys.six_linear(), "static", layers=2, stop_at=13, checkpoint=tmp_path / "broken")
    resumed, caching = run(toys.six_linear(), "static", layers=2, checkpoint=tmp_path / "broken")
    assert resumed.status == "finished"
    assert unbroken.figures | {"bytes": 0} == {"hits": 10, "misses": 10, "bytes": 0, "cut": "2", "reason": ""}
    # 10 misses and 3 hits before; the features were lost, and in the 7 batches left of an epoch no sample comes again.
    assert (caching.hits.total(), caching.misses) == (3, 17)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adapters_have_no_layers_to_freeze():
    freezing = FreezeHook(make_policy("none"), layers=())
    train(toys.six_linear(), seed=0, device="cpu", hooks=(freezing,))
    assert freezing.controller.layers == ()
    assert freezing.controller.history == []

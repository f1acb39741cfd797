"""Feature caches for augmented samples: what they give is put together from what they kept, and nothing else."""

import pytest
import torch
from torch import nn

from predictor import AugmentedCache, Compression, FeatureCache, FreezeController
from predictor.cache.augmented import channel_similarity
from predictor.errors import UsageError
from tests.predictor.counted import CountedConv
from tests.predictor.scripted import Script

IDS = torch.arange(12)
X = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FLIPPED = X.flip(-1)
LATER = X.roll(3, -1)


def network():
    torch.manual_seed(0)
    prefix = [CountedConv(1, 4, 3, padding=1), nn.Tanh(), CountedConv(4, 4, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*prefix, nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))


def kept(kind, answers=None, **options):
    model = network()
    script = Script({0: {0}} if answers is None else answers)
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), script, total_steps=999, say=None)
    return model, controller, kind(controller, **options)


def run(model, cache, x, ids=IDS):
    with cache.batch(ids):
        return model(x).detach()


@torch.no_grad()
def two_views(model):
    """What the model makes of each sample from its first view, and from its second one's most sensitive channel."""
    first, second = model[:2](X), model[:2](FLIPPED)
    channel = int(channel_similarity(first, second).argmin())
    mixed = first.clone()
    mixed[:, channel] = second[:, channel]
    assert not torch.allclose(model[2:](mixed), model[2:](second))  # it is a part of the second view alone
    return model[2:](first), model[2:](mixed)


def which(output, candidates):
    """For each sample, which of two known outputs it is."""
    near = torch.stack([(output - known).abs().amax(1) < 1e-6 for known in candidates])
    assert bool((near.sum(0) == 1).all())
    return near[1].int().tolist()


def test_a_hit_gives_one_of_the_views_of_each_sample():
    model, _, cache = kept(AugmentedCache, views=2, channels=0.25)
    candidates = two_views(model)
    assert torch.allclose(run(model, cache, X), candidates[0])
    run(model, cache, FLIPPED)
    assert (cache.misses, cache.hits, cache.cut, cache.reason) == (2, 0, "1", "")
    calls = model[0].calls
    drawn = [which(run(model, cache, LATER), candidates) for _ in range(4)]
    assert (cache.misses, cache.hits, model[0].calls) == (2, 4, calls)
    assert {0, 1} == {view for views in drawn for view in views}
    assert len(set(map(tuple, drawn))) > 1
    assert cache.bytes == 12 * (4 * 64 * 4 + 4) + 12 * 64 * 4
    assert cache.exact_bytes == 12 * (4 * 64 * 4 + 4)


def test_what_is_drawn_depends_on_the_seed_and_leaves_other_random_numbers_alone():
    drawn = []
    for seed in (0, 0, 1):
        model, _, cache = kept(AugmentedCache, views=2, seed=seed)
        for x in (X, FLIPPED):
            run(model, cache, x)
        before = torch.get_rng_state()
        drawn.append([run(model, cache, LATER) for _ in range(3)])
        assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not all(map(torch.equal, drawn[0], drawn[2]))


def test_with_one_view_the_features_of_the_first_time_stand_for_all():
    model, _, cache = kept(AugmentedCache, views=1)
    first = run(model, cache, X)
    assert torch.equal(run(model, cache, FLIPPED), first)
    assert cache.hits == 1


def test_a_batch_with_a_sample_that_lacks_a_view_runs_the_prefix():
    model, _, cache = kept(AugmentedCache, views=2)
    for x in (X, FLIPPED):
        run(model, cache, x[:6], IDS[:6])
    whole = run(model, cache, LATER)
    assert torch.allclose(whole, model(LATER))
    assert cache.misses == 3
    run(model, cache, X[:6], IDS[:6])
    assert cache.hits == 1


def test_a_prefix_that_grows_is_filled_from_the_old_views_but_for_its_first_batch():
    model, controller, cache = kept(AugmentedCache, {0: {0}, 1: {0, 1}}, views=2)
    for x in (X, FLIPPED):
        run(model, cache, x)
    controller.step()
    assert torch.allclose(run(model, cache, LATER), model(LATER))
    assert (cache.cut, cache.taken, cache.reason) == ("3", {None: 12}, "")
    calls = model[0].calls
    run(model, cache, LATER)
    assert (cache.taken, model[0].calls) == ({frozenset({0}): 12}, calls)
    inner = model[2].calls
    run(model, cache, LATER)
    assert (cache.taken, model[2].calls) == ({frozenset({0, 1}): 12}, inner)


def test_a_prefix_whose_first_features_stand_for_all_grows_too():
    """Features of the first time are not what a later pass gives, and so prove nothing of a new cut."""
    model, controller, cache = kept(FeatureCache, {0: {0}, 1: {0, 1}}, check_inputs=False)
    run(model, cache, X)
    controller.step()
    assert torch.allclose(run(model, cache, FLIPPED), model(FLIPPED))
    assert (cache.cut, cache.reason) == ("3", "")
    run(model, cache, X)
    assert cache.taken == {frozenset({0, 1}): 12}


def test_views_are_kept_in_fewer_bytes():
    model, _, cache = kept(AugmentedCache, views=2, compression=Compression(half_from=0.0, int8_from=0.5))
    candidates = two_views(model)
    for x in (X, FLIPPED):
        run(model, cache, x)
    output = run(model, cache, LATER)
    off = torch.stack([(output - known).abs().amax(1) for known in candidates]).amin(0)
    assert 0 < float(off.max()) < 1e-3
    assert cache.precision == "half"  # 1 of 3 layers
    assert cache.bytes == 12 * (4 * 64 * 2 + 4) + 12 * 64 * 2


def test_it_goes_on_from_its_state_bit_for_bit():
    model, _, cache = kept(AugmentedCache)
    for x in (X, FLIPPED, LATER):
        run(model, cache, x)
    other, _, resumed = kept(AugmentedCache)
    resumed.load_state_dict(cache.state_dict())
    for _ in range(3):
        assert torch.equal(run(other, resumed, LATER), run(model, cache, LATER))
    assert (resumed.hits, resumed.misses, resumed.bytes) == (cache.hits, cache.misses, cache.bytes)


@pytest.mark.parametrize(("options", "named"), [({"views": 0}, "views=0"), ({"channels": 0.0}, r"channels=0\.0")])
def test_wrong_use_is_refused(options, named):
    with pytest.raises(UsageError, match=named):
        kept(AugmentedCache, **options)

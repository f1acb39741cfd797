"""Features in fewer bytes: how far numbers may be off, what they take, and from when on."""

import io

import pytest
import torch

from predictor import Compression, FeatureCache, FreezeController
from predictor.cache.compression import CompressedStore, compressed, restored
from predictor.errors import UsageError
from tests.predictor.counted import X, cached, chain, run
from tests.predictor.scripted import Script

GROWING = {step: range(step + 1) for step in range(3)}
CPU = torch.device("cpu")


def there_and_back(leaf, precision):
    return restored(compressed(leaf, precision), leaf.dtype)


def test_int8_by_hand():
    map_BCHW = torch.zeros(1, 2, 4, 4)
    map_BCHW[0, 0, 0] = torch.tensor([12.7, -6.34, 0.04, 0.16])  # in steps of 0.1
    map_BCHW[0, 1] = -0.127  # in steps of 0.001
    codes, scale = compressed(map_BCHW, "int8")
    assert scale.flatten().tolist() == pytest.approx([0.1, 0.001])
    assert codes.dtype == torch.int8
    assert codes[0, 0, 0].tolist() == [127, -63, 0, 2]
    assert codes[0, 1].unique().tolist() == [-127]
    back = there_and_back(map_BCHW, "int8")
    assert back[0, 0, 0].tolist() == pytest.approx([12.7, -6.3, 0.0, 0.2])
    assert not back[0, 0, 1:].any()


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((6, 3, 5, 4), (2, 3)),  # 20 numbers in a channel: it has a scale of its own
        ((6, 20, 4), (1,)),  # the channels of a sequence are last
        ((6, 3, 2, 2), (1, 2, 3)),  # 4 numbers are too few
        ((6, 8), (1,)),
    ],
)
def test_int8_is_off_by_half_a_step_at_most(shape, group):
    leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[-1])
    largest = leaf.abs().amax(group, keepdim=True)
    off = (there_and_back(leaf, "int8") - leaf).abs()
    assert bool((off <= largest / 254 * (1 + 1e-5)).all())
    assert bool((off.amax(group, keepdim=True) > largest / 2540).all())  # and no finer than it claims


def test_half_is_off_by_its_own_rounding_at_most():
    leaf = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)) * 1000
    off = (there_and_back(leaf, "half") - leaf).abs()
    assert float(off.max()) > 0
    assert bool((off <= leaf.abs() * 2.0**-11 + 2.0**-25).all())
    assert there_and_back(torch.tensor([[1e6, -1e6]]), "half").tolist() == [[65504.0, -65504.0]]


def test_what_is_short_or_whole_already_is_kept_as_it_is():
    short = torch.ones(2, 3, dtype=torch.bfloat16)
    assert compressed(short, "half")[0] is short
    for leaf in (torch.ones(5), torch.ones(2, 3, dtype=torch.int64)):
        for precision in ("half", "int8"):
            assert compressed(leaf, precision)[0] is leaf


def test_more_is_rounded_as_more_freezes():
    compression = Compression(half_from=0.25, int8_from=0.5)
    assert [compression.precision(share) for share in (0.2, 0.25, 0.4, 0.5, 1.0)] == [
        "full",
        *["half"] * 2,
        *["int8"] * 2,
    ]
    assert Compression(2, 2).precision(1.0) == "full"
    with pytest.raises(UsageError, match=r"half_from=0\.5, int8_from=0\.25"):
        Compression(0.5, 0.25)


@pytest.mark.parametrize(
    ("precision", "row_bytes"),
    [("full", 2 * 16 * 4 + 4), ("half", 2 * 16 * 2 + 4), ("int8", 2 * (16 + 4) + 4)],
)
@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_a_store_counts_its_bytes_and_gives_rows_in_their_format(precision, row_bytes, memory_bytes, tmp_path):
    images = torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    numbers = torch.arange(6.0)
    store = CompressedStore([images, numbers], memory_bytes, tmp_path, precision=precision)
    assert store.fits([images[:2], numbers[:2]])
    assert not store.fits([images.half(), numbers])
    store.put([7, 8, 9], [images[:3], numbers[:3]])
    first, second = store.get([9, 7], CPU)
    assert torch.equal(first, there_and_back(images, precision)[[2, 0]])
    assert second.tolist() == [2, 0]
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert (store.bytes, store.exact_bytes) == (3 * row_bytes, 3 * (2 * 16 * 4 + 4))


def growing(compression):
    model = chain()
    controller = FreezeController(model, torch.optim.SGD(model.parameters(), lr=0.0), Script(GROWING), total_steps=999)
    return model, controller, FeatureCache(controller, compression=compression)


def test_a_cache_rounds_more_when_its_prefix_has_grown():
    model, controller, cache = growing(Compression())
    ids, expected = torch.arange(12), model(X)
    assert cache.precision is None
    assert torch.equal(run(model, cache, ids), expected)
    assert (cache.precision, cache.bytes) == ("half", 12 * (8 * 2 + 4))  # 1 of 3 layers; 8 features and a fingerprint
    rounded = run(model, cache, ids)
    assert torch.allclose(rounded, expected, atol=1e-3)
    assert not torch.equal(rounded, expected)
    controller.step()
    assert torch.equal(run(model, cache, ids), expected)  # as a whole: rounded features prove nothing of a new cut
    assert (cache.precision, cache.taken, cache.reason) == ("int8", {None: 12}, "")
    rounded = run(model, cache, ids)
    assert torch.allclose(rounded, expected, atol=1e-2)
    assert not torch.equal(rounded, expected)
    assert cache.taken == {frozenset({0, 1}): 12}
    assert cache.bytes == 12 * (8 + 4 + 4)  # with a scale
    assert cache.exact_bytes == 12 * (8 * 4 + 4)


def test_all_but_the_first_batch_of_a_new_cut_are_filled_from_rounded_features():
    model, controller, cache = growing(Compression())
    first, second = torch.arange(6), torch.arange(6, 12)
    for ids in (first, second):
        run(model, cache, ids)
    controller.step()
    run(model, cache, first)
    calls = model[1].calls
    filled = run(model, cache, second)
    assert (cache.taken, model[1].calls) == ({frozenset({0}): 6}, calls)
    assert torch.allclose(filled, model(X[second]), atol=1e-3)
    run(model, cache, second)
    assert cache.taken == {frozenset({0, 1}): 6}


def test_rounded_features_of_samples_that_changed_are_refused_too():
    model = chain()
    cache = cached(model, compression=Compression())
    run(model, cache, torch.arange(12))
    run(model, cache, torch.arange(12))
    with pytest.warns(UserWarning, match="sample 1 is not what it was"), cache.batch([0, 1]):
        model(torch.stack([X[0], X[1].flip(-1)]))


def test_a_cache_goes_on_from_its_state_bit_for_bit():
    first, second, whole = torch.arange(6), torch.arange(6, 12), torch.arange(12)

    def going():
        model, controller, cache = growing(Compression())
        for ids in (first, second):
            run(model, cache, ids)
        controller.step()
        run(model, cache, first)
        return model, controller, cache

    model, controller, cache = going()
    file = io.BytesIO()
    torch.save({"controller": controller.state_dict(), "cache": cache.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, another, resumed = growing(Compression())
    another.load_state_dict(state["controller"])
    resumed.load_state_dict(state["cache"])
    resumed.load_state_dict(resumed.state_dict())  # also before it has seen a batch
    for ids in (second, first, whole):
        assert torch.equal(run(other, resumed, ids), run(model, cache, ids))
        assert (resumed.taken, resumed.bytes, resumed.kept) == (cache.taken, cache.bytes, cache.kept)
    assert (resumed.hits, resumed.misses) == (cache.hits, cache.misses)


def test_a_state_of_another_model_is_refused():
    model = chain()
    cache = cached(model)
    run(model, cache, torch.arange(12))
    state = cache.state_dict()
    state["levels"][0]["given"] = [["body.7", 0]]
    other = chain()
    resumed = cached(other)
    resumed.load_state_dict(state)
    with pytest.raises(UsageError, match=r"its module 'body\.7'"):
        run(other, resumed, torch.arange(12))

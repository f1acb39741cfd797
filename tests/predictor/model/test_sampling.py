"""Which weights of a layer are watched, and when."""

import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import Layer, layers_of
from predictor.model.sampling import LayerSampler, SampleSpec, thinned


def layer_of(*shapes):
    start, own = 0, []
    for shape in shapes:
        size = torch.Size(shape).numel()
        own.append(nn.Parameter(torch.arange(start, start + size, dtype=torch.float32).reshape(shape)))
        start += size
    return Layer("layer", (), tuple(own))


def test_positions_are_drawn_once_and_follow_the_weights():
    layer = layer_of((10, 10))
    sampler = LayerSampler([layer], SampleSpec(weights=16))
    first = sampler.sample(0)
    with torch.no_grad():
        layer.own[0].add_(0.5)
    assert torch.equal(sampler.sample(0), first + 0.5)
    assert len(first.unique()) == 16


def test_positions_in_a_large_layer_are_distinct_and_lie_all_over_it():
    values = LayerSampler([layer_of((1000, 100))], SampleSpec(weights=1000)).sample(0)
    assert len(values.unique()) == 1000
    assert values.mean() == pytest.approx(50_000, rel=0.06)
    assert values.max() > 99_000


def test_two_samplers_of_one_spec_agree_and_of_another_seed_do_not():
    layers = [layer_of((10, 10)), layer_of((10, 10))]
    first, second = (LayerSampler(layers, SampleSpec(weights=16)).sample_all() for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 16)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, LayerSampler(layers, SampleSpec(weights=16, seed=1)).sample_all())


def test_only_matrices_are_sampled_where_there_are_any():
    layer = layer_of((5,), (4, 4), (7,), (2, 2))  # values 5..20 and 28..31 are in matrices
    values = LayerSampler([layer], SampleSpec(weights=20)).sample(0)
    assert sorted(values.int().tolist()) == [*range(5, 21), *range(28, 32)]
    assert sorted(LayerSampler([layer_of((6,))], SampleSpec(weights=6)).sample(0).int().tolist()) == list(range(6))


def test_a_small_layer_gives_each_weight_in_turn():
    values = LayerSampler([layer_of((3, 1))], SampleSpec(weights=8)).sample(0).int().tolist()
    assert values[:3] == values[3:6]
    assert values[6:] == values[:2]
    assert sorted(values[:3]) == [0, 1, 2]


def test_memory_layout_and_precision_do_not_matter():
    conv = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1))
    plain = LayerSampler(layers_of(conv), SampleSpec(weights=32)).sample(0)
    conv = conv.to(memory_format=torch.channels_last)
    assert torch.equal(plain, LayerSampler(layers_of(conv), SampleSpec(weights=32)).sample(0))
    half = LayerSampler(layers_of(conv.bfloat16()), SampleSpec(weights=32)).sample(0)
    assert half.dtype == torch.float32
    assert torch.allclose(plain, half, atol=1e-2)


def test_drawing_leaves_the_trainings_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    LayerSampler([layer_of((10, 10))], SampleSpec(weights=16)).sample(0)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("total", "expected"), [(8, [0, 2, 4, 6, 8]), (10, [0, 3, 5, 8, 10]), (3, [0, 1, 2, 3])])
def test_snapshots_are_evenly_spread_and_end_with_the_training(total, expected):
    spec = SampleSpec(snapshots=4)
    assert [step for step in range(total + 1) if spec.due(step, total)] == expected


@pytest.mark.parametrize("wrong", [{"weights": 0}, {"snapshots": 0}])
def test_a_spec_that_samples_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="count from 1"):
        SampleSpec(**wrong)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_beyond_the_generators_is_refused(seed):
    with pytest.raises(UsageError, match=f"seed={seed}: give a whole number from 0 to 4294967295"):
        SampleSpec(seed=seed)
    sampler = LayerSampler([layer_of((10, 10))], SampleSpec(weights=16, seed=2**32 - 1))
    assert len(sampler.sample(0).unique()) == 16


def test_fewer_weights_are_of_all_matrices_alike():
    values = LayerSampler([layer_of((20, 30), (20, 10))], SampleSpec(weights=200)).sample_all()
    share = float((values < 600).double().mean())
    for weights in (40, 70):
        assert thinned(values, weights).shape == (1, weights)
        assert float((thinned(values, weights) < 600).double().mean()) == pytest.approx(share, abs=0.03)
    assert thinned(values, 200) is values


def partly(*trains, shape=(8, 8)):
    """A layer of matrices, of which some train. The values of each begin at a multiple of a thousand."""
    own = [nn.Parameter(torch.arange(64.0).reshape(shape) + 1000 * number) for number in range(len(trains))]
    for parameter, train in zip(own, trains, strict=True):
        parameter.requires_grad_(train)
    return Layer("layer", (), tuple(own))


def sources(sampler):
    return set((sampler.sample(0) // 1000).int().tolist())


def test_only_what_trains_is_sampled_and_a_layer_at_rest_as_a_whole():
    assert sources(LayerSampler([partly(False, True, True)], SampleSpec(weights=32))) == {1, 2}
    assert sources(LayerSampler([partly(False, False)], SampleSpec(weights=32))) == {0, 1}
    assert LayerSampler([partly(False, True)], SampleSpec()).sizes_L == [64]
    assert LayerSampler([partly(False, False)], SampleSpec()).sizes_L == [128]
    adapter = Layer("layer", (), (nn.Parameter(torch.zeros(8, 8), requires_grad=False), nn.Parameter(torch.ones(3))))
    assert set(LayerSampler([adapter], SampleSpec(weights=8)).sample(0).tolist()) == {1.0}


def test_what_is_opened_later_is_sampled_from_then_on():
    layers = [partly(False, True), partly(True, True), partly(False, False)]
    sampler = LayerSampler(layers, SampleSpec(weights=32))
    before = sampler.sample_all()
    assert sampler.follow() == []
    for parameter in layers[1].own:  # as a controller freezes it, or an adapter that is switched off for a while
        parameter.requires_grad_(False)
    assert sampler.follow() == []
    for layer in (layers[0], layers[2]):
        for parameter in layer.own:
            parameter.requires_grad_(True)
    assert sampler.follow() == [0]  # the last was sampled as a whole already
    after = sampler.sample_all()
    assert sources(sampler) == {0, 1}
    assert torch.equal(before[1:], after[1:])


def test_a_sampler_goes_on_with_what_was_sampled_before_a_restart():
    layer = partly(False, True)
    state = LayerSampler([layer], SampleSpec(weights=32)).state_dict()
    layer.own[0].requires_grad_(True)
    resumed = LayerSampler([layer], SampleSpec(weights=32))
    assert sources(resumed) == {0, 1}
    resumed.load_state_dict(state)
    assert sources(resumed) == {1}
    assert resumed.follow() == [0]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_every_width_are_read(dtype):
    layer = Layer("layer", (), (nn.Parameter(torch.ones(6, 6).to(dtype)), nn.Parameter(torch.ones(4, 2, 2).to(dtype))))
    values = LayerSampler([layer], SampleSpec(weights=16)).sample(0)
    assert values.dtype == torch.float32
    assert values.tolist() == [1.0] * 16


def test_complex_weights_are_read_as_pairs_and_integers_left_out():
    wave = Layer("layer", (), (nn.Parameter(torch.full((4, 4), 1 + 2j)),))
    assert set(LayerSampler([wave], SampleSpec(weights=24)).sample(0).tolist()) == {1.0, 2.0}
    codes = nn.Parameter(torch.full((4, 4), 7, dtype=torch.uint8), requires_grad=False)
    assert set(LayerSampler([Layer("l", (), (codes,))], SampleSpec(weights=4)).sample(0).tolist()) == {0.0}
    both = Layer("l", (), (codes, nn.Parameter(torch.full((2, 2), 3.0))))
    assert set(LayerSampler([both], SampleSpec(weights=4)).sample(0).tolist()) == {3.0}


@pytest.mark.parametrize("shapes", [[(0, 4)], [(0,)], [(0, 4), (3,)], [(0, 4), ()], [()]])
def test_weights_without_elements_and_single_numbers(shapes):
    layer = Layer("layer", (), tuple(nn.Parameter(torch.full(shape, 5.0)) for shape in shapes))
    expected = 5.0 if layer.size else 0.0
    assert LayerSampler([layer], SampleSpec(weights=4)).sample(0).tolist() == [expected] * 4


def test_the_users_default_dtype_and_device_change_nothing():
    layers = [layer_of((100, 100)), layer_of((5, 5))]
    plain = LayerSampler(layers, SampleSpec(weights=16)).sample_all()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device, which older PyTorch cannot take back
            found = LayerSampler(layers, SampleSpec(weights=16)).sample_all()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain, found)


def test_positions_follow_a_model_that_is_moved():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    sampler = LayerSampler(layers_of(model), SampleSpec(weights=8))
    sampler.sample_all()
    model.to("meta")  # stands for any other device: the parameters stay the same objects where they can
    sampler._drawn[0].parameters = [model[0].weight]
    assert sampler.sample(0).device.type == "meta"

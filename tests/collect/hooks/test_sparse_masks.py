"""Sparse masks: which weights they cover, which are pruned and grown and when, and what that would save."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collect.hooks.sparse_masks import SparseMasks
from collect.training.loop import Training
from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops, count_flops
from tests.collect.tiny import PlainNet, tiny_source, tiny_train, tiny_workload
from tests.collect.training.test_resume import assert_same


class Deep(nn.Module):
    """A convolution with a norm, another one, a depthwise one, a dense layer, and the head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.dense = nn.Linear(4 * 8 * 8, 10)
        self.head = nn.Linear(10, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.tanh(self.second(torch.tanh(self.norm(self.stem(x_BCHW)))))
        logits: Tensor = self.head(torch.tanh(self.dense(torch.tanh(self.depthwise(x_BCHW)).flatten(1))))
        return logits


MASKED = ["second.weight", "depthwise.weight", "dense.weight"]
"""The names of those weights of Deep that masks are for: 144, 36 and 2560."""


class Chain(nn.Sequential):
    """A dense layer of 64 weights, one of 10, and the head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 10), nn.Linear(10, classes))


def begun(net: type[nn.Module] = Chain, sparsity: float = 0.5, **options: Any) -> tuple[Training, SparseMasks]:
    """A training of 100 epochs of one step that has just started, and its masks."""
    workload = tiny_workload(net, batch_size=24, epochs=100)
    training = Training(workload, tiny_source(), seed=0, device=torch.device("cpu"))
    masks = SparseMasks(sparsity, **options)
    masks.on_start(training)
    return training, masks


def at_step(step: int, training: Training, masks: SparseMasks) -> None:
    training.step = step
    masks.on_step(training)


def active(masks: SparseMasks, name: str) -> list[int]:
    return (~masks.masked[name]).flatten().nonzero().flatten().tolist()


# Which weights


def test_dense_and_convolution_layers_are_masked_and_nothing_else() -> None:
    training, masks = begun(Deep, 0.75)
    held = {name: int(mask.sum()) for name, mask in masks.masked.items()}
    assert held == {"second.weight": 108, "depthwise.weight": 27, "dense.weight": 1920}
    for name, parameter in training.model.named_parameters():
        if name in MASKED:
            assert torch.equal(parameter == 0, masks.masked[name])
        elif name != "norm.bias":  # zero by itself
            assert (parameter != 0).all(), name
    size = 40 + 8 + 148 + 40 + 2570 + 33
    assert size == sum(parameter.numel() for parameter in training.model.parameters())
    assert masks.figures == {"sparsity": (108 + 27 + 1920) / size, "changes": 0}


def test_a_first_layer_that_is_dense_is_masked() -> None:
    _, masks = begun(Chain)
    assert {name: int(mask.sum()) for name, mask in masks.masked.items()} == {"1.weight": 32, "2.weight": 5}


def test_one_weight_is_left_of_any_layer() -> None:
    _, masks = begun(Chain, 0.999)
    assert [int((~mask).sum()) for mask in masks.masked.values()] == [1, 1]


def test_attention_of_torchs_own_is_masked_too() -> None:
    class Attending(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(64, classes)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            rows_BTC = x_BCHW.squeeze(1)
            logits: Tensor = self.head(self.attention(rows_BTC, rows_BTC, rows_BTC)[0].flatten(1))
            return logits

    _, masks = begun(Attending)
    assert list(masks.masked) == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_the_seed_decides_and_the_global_random_numbers_stand_still() -> None:
    one, other, again = (SparseMasks(0.5) for _ in range(3))
    for masks, seed in ((one, 0), (other, 1), (again, 0)):
        tiny_train((masks,), seed=seed, net=Deep, epochs=2)
    assert one.changes == 1
    assert_same(one.masked, again.masked)
    assert not any(torch.equal(one.masked[name], other.masked[name]) for name in MASKED)
    training, _ = begun()
    state, masks = torch.get_rng_state(), SparseMasks(0.5)
    masks.on_start(training)
    at_step(2, training, masks)
    assert masks.changes == 1
    assert torch.equal(torch.get_rng_state(), state)


# Pruning and growing


def test_the_least_are_pruned_and_as_many_others_grown_from_zero() -> None:
    training, masks = begun(moved=0.4)
    weight, before = training.model.get_parameter("2.weight"), active(masks, "2.weight")
    with torch.no_grad():
        weight[before, 0] = torch.tensor([0.3, -0.2, 0.1, -0.9, 0.5])
    at_step(2, training, masks)
    # Two of five move: 0.1 and -0.2, least in magnitude.
    now = active(masks, "2.weight")
    assert set(before) - set(now) == {before[1], before[2]}
    assert len(now) == 5
    expected = torch.zeros(10)
    expected[[before[0], before[3], before[4]]] = torch.tensor([0.3, -0.9, 0.5])
    assert torch.equal(weight[:, 0], expected)


def test_of_equal_weights_those_in_front_are_pruned() -> None:
    training, masks = begun(moved=0.4)
    before = active(masks, "2.weight")
    with torch.no_grad():
        training.model.get_parameter("2.weight")[before] = 0.5
    at_step(2, training, masks)
    assert set(before) - set(active(masks, "2.weight")) == set(before[:2])


def test_no_more_are_pruned_than_can_grow() -> None:
    training, masks = begun(sparsity=0.1, moved=1.0)
    before = dict(masks.masked)
    at_step(2, training, masks)
    # 6 of 64 and 1 of 10 were masked: all of them are active now, in place of as many.
    assert {name: int(mask.sum()) for name, mask in masks.masked.items()} == {"1.weight": 6, "2.weight": 1}
    assert not any((before[name] & mask).any() for name, mask in masks.masked.items())


@pytest.mark.parametrize(
    ("every", "step", "moved"),
    [
        (1, 1, 0),  # the first step of all
        (1, 2, 16),
        (1, 57, 16),  # after 56 of 100
        (1, 58, 8),  # after 57, beyond 9/16
        (1, 75, 8),
        (1, 76, 0),  # after three quarters
        (10, 11, 16),
        (10, 12, 0),
        (10, 20, 0),
    ],
)
def test_when_and_how_many(every: int, step: int, moved: int) -> None:
    training, masks = begun(every=every, moved=0.5)
    before = active(masks, "1.weight")  # 32 of 64
    at_step(step, training, masks)
    assert len(set(before) - set(active(masks, "1.weight"))) == moved
    assert masks.changes == (moved > 0)


# FLOPs


def test_what_no_work_on_zeros_would_leave_worked_out_by_hand() -> None:
    _, masks = begun(PlainNet, 0.75)
    # One layer of 64 x 8, of which a quarter is active, with 20 FLOPs of its 100 in products of activations.
    thin = masks.thinned(LayerFlops((100,), (20,), (80,), 7))
    assert thin == LayerFlops((40,), (20,), (20,), 7)
    # Forward 40 + 7; weights 20 + 7; inputs 20 + 2 * 20, and the head's 7, without the first product's 20.
    assert thin.step(frozenset()) == 47 + 27 + 60 + 7 - 20
    assert thin.step(frozenset({0})) == 47 + 7


def test_a_first_convolution_and_the_head_cost_what_they_did() -> None:
    training, masks = begun(Deep, 0.75)
    dense = count_flops(training.model, training.layers, (tiny_source().probe(2),), {})
    thin = masks.thinned(dense)
    stem, *others = (ours / theirs for ours, theirs in zip(thin.forward_L, dense.forward_L, strict=True))
    assert (stem, others, thin.head) == (1, [0.25] * 3, dense.head)


# What cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0}, "sparsity=0: give a share"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": 0.5, "every": 0}, "every=0"),
        ({"sparsity": 0.5, "moved": 1.1}, "moved=1.1"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparseMasks(**options)


def test_a_model_with_nothing_to_mask() -> None:
    class Convolution(nn.Sequential):
        def __init__(self, classes: int) -> None:
            super().__init__(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, classes))

    with pytest.raises(UsageError, match=r"sparsity=0\.5: tiny has no dense or convolution layer between"):
        tiny_train((SparseMasks(0.5),), net=Convolution)

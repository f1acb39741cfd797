"""The clock and the gains, by hand."""

import math

import pytest
import torch

from predictor.model.features import (
    CLOCK,
    GAINS,
    SIGNALS,
    depth_of,
    distance_of,
    log_lr,
    moves_of,
    recorded_signals,
    signals_of,
)

COLUMN = {name: place for place, name in enumerate(SIGNALS)}


def recording(lr=(0.1, 0.2, 0.02)):
    """Three snapshots of two layers at steps 0, 4 and 8 of 8, with two sampled weights of a size of 8 and 18."""
    weights = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[1.0, 3.0], [2.0, 0.0]], [[2.0, 2.0], [0.0, 2.0]]])
    gradient = torch.tensor([[math.nan, math.nan], [3.0, 4.0], [0.0, 2.0]])
    sizes = torch.tensor([8, 18])
    return recorded_signals(weights, gradient, torch.tensor([0, 4, 8]), torch.tensor(lr), sizes, total_steps=8)


def test_the_clock_by_hand():
    signals = recording()
    assert signals.shape == (3, 2, len(CLOCK) + len(GAINS))
    assert signals[:, 0, COLUMN["progress"]].tolist() == [0.0, 0.5, 1.0]
    assert signals[0, :, COLUMN["depth"]].tolist() == [0.0, 1.0]
    assert signals[:, 1, COLUMN["log_lr"]].tolist() == pytest.approx([0.0, 0.0, math.log(0.1)], abs=1e-6)


def test_distances_by_hand():
    signals = recording()
    # Layer 0 went by (0, 2) from where it began, and is (1, 3) now: both by the root mean square.
    first = math.log(math.sqrt(2) / math.sqrt(5) + 1e-4)
    assert signals[1, 0, COLUMN["log_distance"]] == pytest.approx(first, abs=1e-5)
    assert signals[1, 1, COLUMN["log_distance"]] == pytest.approx(math.log(1e-4), abs=1e-5)
    assert signals[1, 1, COLUMN["front_distance"]] == pytest.approx((first + math.log(1e-4)) / 2, abs=1e-5)


def test_gains_by_hand():
    signals = recording()
    # Step 4 of 8: two more halves of the four remaining steps, and one. Layer 0 moved by (0, 2) in four steps.
    move = math.sqrt(2) * math.sqrt(8 / 4)
    assert signals[1, 0, COLUMN["log_gain"]] == pytest.approx(math.log(3 * move * 3), abs=1e-5)
    assert signals[1, 1, COLUMN["log_gain"]] == pytest.approx(math.log(1e-6), abs=1e-5)
    assert signals[1, 1, COLUMN["log_front_gain"]] == pytest.approx(math.log(3 * move * 3), abs=1e-5)
    assert signals[1, 0, COLUMN["log_front_share"]] == pytest.approx(math.log(1 + 1e-4), abs=1e-5)
    assert signals[1, 0, COLUMN["log_gradient"]] == pytest.approx(math.log(5), abs=1e-5)
    # At the end layer 0 has no gradient left, and all that is gained is gained by layer 1.
    assert signals[2, 0, COLUMN["log_front_share"]] == pytest.approx(math.log(1e-4), abs=1e-5)
    assert signals[2, 1, COLUMN["log_front_share"]] == pytest.approx(math.log(1 + 1e-4), abs=1e-5)


def test_before_the_first_step_and_without_a_learning_rate_all_signals_are_numbers():
    assert recording(lr=(0.0, 0.0, 0.0)).isfinite().all()
    assert recording(lr=(0.1, 0.1, 0.0))[2, 0, COLUMN["log_lr"]] == -10.0


def test_gains_change_neither_with_the_order_nor_with_the_number_of_sampled_weights():
    generator = torch.Generator().manual_seed(0)
    before, now = torch.randn(2, 1, 3, 4096, generator=generator)
    sizes, steps = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([5.0])
    whole = moves_of(now, before, steps, sizes)
    order = torch.randperm(4096, generator=generator)
    assert torch.allclose(moves_of(now[..., order], before[..., order], steps, sizes), whole)
    assert torch.allclose(moves_of(now[..., ::4], before[..., ::4], steps, sizes), whole, rtol=0.05)
    assert torch.allclose(distance_of(7 * now, 7 * before[0]), distance_of(now, before[0]))


def test_a_snapshot_alone_has_the_signals_that_it_has_in_a_recording():
    now, before, first = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    gradient, sizes, steps = torch.tensor([0.5, 0.25]), torch.tensor([100.0, 50.0]), torch.tensor([0, 3, 7])
    weights = torch.stack([first, before, now])
    rates = torch.tensor([0.1, 0.3, 0.2])
    whole = recorded_signals(weights, gradient.expand(3, 2), steps, rates, sizes, total_steps=10)
    alone = signals_of(
        torch.tensor([7]),
        torch.tensor([log_lr(0.2, 0.3)]),
        distance_of(now[None], first),
        gradient[None],
        moves_of(now[None], before[None], torch.tensor([4.0]), sizes),
        total_steps=10,
    )
    assert torch.allclose(alone[0], whole[2], atol=1e-5)


def test_a_single_layer_is_the_first():
    assert depth_of(1).tolist() == [0.0]

"""The features, by hand."""

import math

import pytest
import torch

from predictor.errors import UsageError
from predictor.model.config import FEATURES, PredictorConfig
from predictor.model.features import depth, distance, motion, move, tokens
from predictor.model.history import LayerHistory

COLUMN = {name: index for index, name in enumerate(FEATURES)}


def history(lr=(0.1, 0.2, 0.02)):
    """Three snapshots of two layers at steps 0, 4 and 8 of 8, with two sampled weights of 8 and of 18."""
    weights = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[1.0, 3.0], [2.0, 0.0]], [[2.0, 2.0], [0.0, 2.0]]])
    gradient = torch.tensor([[math.nan, math.nan], [3.0, 4.0], [0.0, 2.0]])
    made, rows = LayerHistory([8, 18], total_steps=8, window=3), []
    for row, step in enumerate((0, 4, 8)):
        assert made.update(step, lr[row], weights[row], gradient[row])
        rows.append(made.features_LF)
    return torch.stack(rows)


def test_the_clock():
    features = history()
    assert features.shape == (3, 2, len(FEATURES))
    assert features[:, 0, COLUMN["progress"]].tolist() == [0.0, 0.5, 1.0]
    assert features[0, :, COLUMN["depth"]].tolist() == [0.0, 1.0]
    assert features[:, 1, COLUMN["log_lr"]].tolist() == pytest.approx([0.0, 0.0, math.log(0.1)], abs=1e-6)


def test_distances():
    features = history()
    # Layer 0 went by (0, 2) from where it began, and is (1, 3) now: both by the root mean square.
    first = math.log(math.sqrt(2) / math.sqrt(5) + 1e-4)
    assert features[1, 0, COLUMN["log_distance"]] == pytest.approx(first, abs=1e-5)
    assert features[1, 1, COLUMN["log_distance"]] == pytest.approx(math.log(1e-4), abs=1e-5)
    assert features[1, 1, COLUMN["front_distance"]] == pytest.approx((first + math.log(1e-4)) / 2, abs=1e-5)


def test_gains():
    features = history()
    # Step 4 of 8: half of the four remaining steps, and one. Layer 0 moved by (0, 2) in four steps.
    moved = math.sqrt(2) * math.sqrt(8 / 4)
    assert features[1, 0, COLUMN["log_gain"]] == pytest.approx(math.log(3 * moved * 3), abs=1e-5)
    assert features[1, 1, COLUMN["log_gain"]] == pytest.approx(math.log(1e-6), abs=1e-5)
    assert features[1, 1, COLUMN["log_front_gain"]] == pytest.approx(math.log(3 * moved * 3), abs=1e-5)
    assert features[1, 0, COLUMN["log_front_share"]] == pytest.approx(math.log(1 + 1e-4), abs=1e-5)
    assert features[1, 0, COLUMN["log_gradient"]] == pytest.approx(math.log(5), abs=1e-5)
    # At the end layer 0 has a gradient of 0, and all that is gained is gained by layer 1.
    assert features[2, 0, COLUMN["log_front_share"]] == pytest.approx(math.log(1e-4), abs=1e-5)
    assert features[2, 1, COLUMN["log_front_share"]] == pytest.approx(math.log(1 + 1e-4), abs=1e-5)


def test_without_a_learning_rate_all_features_are_numbers():
    assert history(lr=(0.0, 0.0, 0.0)).isfinite().all()
    assert history(lr=(0.1, 0.2, 0.0))[2, 0, COLUMN["log_lr"]] == -10.0


def test_gains_change_neither_with_the_order_nor_with_the_number_of_sampled_weights():
    generator = torch.Generator().manual_seed(0)
    before, now = torch.randn(2, 3, 4096, generator=generator)
    sizes = torch.tensor([10.0, 20.0, 30.0])
    whole = move(now, before, 5, sizes)
    order = torch.randperm(4096, generator=generator)
    assert torch.allclose(move(now[..., order], before[..., order], 5, sizes), whole)
    assert torch.allclose(move(now[..., ::4], before[..., ::4], 5, sizes), whole, rtol=0.05)
    assert torch.allclose(distance(7 * now, 7 * before), distance(now, before))


def test_a_single_layer_is_the_first():
    assert depth(1).tolist() == [0.0]


def batch(size=64, window=4, weights=8):
    torch.manual_seed(1)
    return torch.randn(size, window, weights).cumsum(dim=1), torch.rand(size, window, len(FEATURES))


def test_motion():
    # Two weights: (0, 0) -> (3, 4) -> (3, 1). RMS of the newest is sqrt(5).
    found = motion(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [3.0, 1.0]]]))[0]
    first, second = math.sqrt(12.5) / math.sqrt(5), math.sqrt(4.5) / math.sqrt(5)
    assert found[0].tolist() == pytest.approx(
        [math.log(first), 0, math.log(first), 1, 0, 3.5 / math.sqrt(12.5)], abs=1e-5
    )
    expected = [math.log(second), -0.8, 0.0, 1 / (first + second), math.log(second / first), 1.5 / math.sqrt(4.5)]
    assert found[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_motion_depends_neither_on_scale_nor_on_order_of_the_weights():
    weights, _ = batch(weights=32)
    found = motion(weights)
    assert torch.allclose(found, motion(weights * 1000), atol=1e-4)
    assert torch.allclose(found, motion(weights[..., torch.randperm(32)]), atol=1e-5)


def test_motion_of_constant_and_of_zero_weights_is_finite():
    assert motion(torch.ones(1, 4, 8)).isfinite().all()
    assert motion(torch.zeros(1, 4, 8)).isfinite().all()


def test_tokens_are_motion_and_features_or_the_weights_themselves():
    weights, features = batch(3)
    config = PredictorConfig(window=4, weights=8)
    made = tokens(config, weights, features)
    assert made.shape == (3, 3, config.width)
    assert torch.equal(made, torch.cat([motion(weights), features[:, 1:]], dim=-1))
    clock = PredictorConfig(inputs="motion", window=4, weights=8)
    assert torch.equal(tokens(clock, weights, features[..., :3]), made[..., :9])
    assert torch.equal(tokens(PredictorConfig(inputs="raw", window=4, weights=8), weights, features), weights)


def test_of_more_weights_than_configured_some_all_over_are_taken_and_fewer_are_refused():
    config = PredictorConfig(window=4, weights=8)
    weights, features = batch(weights=12)
    taken = [0, 1, 3, 4, 6, 7, 9, 10]  # index * 12 // 8
    assert torch.equal(tokens(config, weights, features), tokens(config, weights[..., taken].clone(), features))
    with pytest.raises(UsageError, match="4 snapshots of at least 8 weights"):
        tokens(config, weights[..., :7], features)
    with pytest.raises(UsageError, match="4 snapshots"):
        tokens(config, weights[:, :3], features[:, :3])
    with pytest.raises(UsageError, match=r"3 features: .*progress, depth"):
        tokens(config, weights[..., :8], features[..., :3])

"""How windows are cut from runs."""

import math

import pytest
import torch

from predictor.errors import UsageError
from predictor.windows import RunWindows, WindowSet, depth_of, log_lr, signals_of


def run_of(name, snapshots, layers, start=0.0):
    """Weight k of layer l at snapshot t is start + 100 t + 10 l + k."""
    t, places, k = torch.meshgrid(torch.arange(snapshots), torch.arange(layers), torch.arange(2), indexing="ij")
    signals = signals_of(torch.arange(snapshots), torch.ones(snapshots), snapshots - 1, layers)
    labels = torch.arange(snapshots)[:, None] >= torch.arange(layers)[None] + 2
    return RunWindows(name, "mlp", "digits", (start + 100.0 * t + 10 * places + k).float(), signals, labels)


def test_signals_by_hand():
    signals = signals_of(torch.tensor([0, 5, 10]), torch.tensor([0.1, 0.2, 0.02]), total_steps=10, layers=3)
    assert signals.shape == (3, 3, 3)
    assert signals[:, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert signals[0, :, 1].tolist() == [0.0, 0.5, 1.0]
    assert signals[:, 1, 2].tolist() == pytest.approx([0.0, 0.0, math.log(0.1)], abs=1e-6)


def test_a_learning_rate_of_zero_and_a_single_layer_have_signals():
    signals = signals_of(torch.tensor([0, 1]), torch.tensor([0.1, 0.0]), total_steps=1, layers=1)
    assert signals[:, 0].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -10.0]]
    assert signals_of(torch.tensor([0]), torch.tensor([0.0]), 1, 1).isfinite().all()


def test_windows_hold_the_last_snapshots_of_one_layer():
    runs = WindowSet((run_of("a", 4, 2), run_of("b", 3, 1, start=1000)), window=3)
    assert runs.index.tolist() == [[0, 2, 0], [0, 2, 1], [0, 3, 0], [0, 3, 1], [1, 2, 0]]
    assert len(runs) == 5
    windows, signals, labels = runs.batch(torch.tensor([3, 4]))
    assert windows.tolist() == [[[110, 111], [210, 211], [310, 311]], [[1000, 1001], [1100, 1101], [1200, 1201]]]
    assert signals[0, :, 0].tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert labels.tolist() == [True, True]
    assert runs.labels_N.tolist() == [True, False, True, True, True]


def test_a_subset_keeps_whole_runs():
    runs = WindowSet((run_of("a", 4, 2), run_of("b", 3, 1)), window=3)
    assert [run.run_id for run in runs.subset([1]).runs] == ["b"]
    assert len(runs.subset([1])) == 1


def test_runs_too_short_for_a_window_are_passed_over_and_none_at_all_is_refused():
    assert len(WindowSet((run_of("a", 4, 2), run_of("b", 2, 1)), window=3)) == 4
    with pytest.raises(UsageError, match="no run has the 9 snapshots"):
        len(WindowSet((run_of("a", 4, 2),), window=9))


def test_one_snapshot_at_a_time_gives_the_same_signals():
    rates = [0.02, 0.1, 0.07, 0.0, 1e-9]
    peaks = [0.02, 0.1, 0.1, 0.1, 0.1]
    whole_TLS = signals_of(torch.arange(5), torch.tensor(rates, dtype=torch.float64), total_steps=4, layers=3)
    one_T = torch.tensor([log_lr(rate, peak) for rate, peak in zip(rates, peaks, strict=True)])
    assert torch.allclose(whole_TLS[:, 0, 2], one_T)
    assert torch.equal(whole_TLS[0, :, 1], depth_of(3))

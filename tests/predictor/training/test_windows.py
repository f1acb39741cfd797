"""How windows are cut from runs."""

import pytest
import torch

from predictor.errors import UsageError
from predictor.training.windows import RunWindows, WindowSet


def run_of(name, snapshots, layers, start=0.0):
    """Weight k of layer l at snapshot t is start + 100 t + 10 l + k."""
    t, places, k = torch.meshgrid(torch.arange(snapshots), torch.arange(layers), torch.arange(2), indexing="ij")
    signals = (torch.arange(snapshots) / (snapshots - 1))[:, None, None].expand(-1, layers, 3)
    labels = torch.arange(snapshots)[:, None] >= torch.arange(layers)[None] + 2
    return RunWindows(name, "mlp", "digits", (start + 100.0 * t + 10 * places + k).float(), signals, labels)


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

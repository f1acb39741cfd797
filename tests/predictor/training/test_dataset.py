"""How windows are cut from runs, and their tokens."""

from dataclasses import replace

import pytest
import torch

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.model.features import tokens as tokens_of
from predictor.training.dataset import RunWindows, Tokens, WindowSet, _pieces, kept_tokens

CONFIG = PredictorConfig(window=6, weights=32, hidden=16, key=8)


def run_of(name, snapshots, layers, start=0.0):
    """Weight k of layer l at snapshot t is start + 100 t + 10 l + k."""
    t, layer, k = torch.meshgrid(torch.arange(snapshots), torch.arange(layers), torch.arange(2), indexing="ij")
    features = (torch.arange(snapshots) / (snapshots - 1))[:, None, None].expand(-1, layers, 3)
    labels = torch.arange(snapshots)[:, None] >= torch.arange(layers)[None] + 2
    return RunWindows(name, "mlp", "digits", (start + 100.0 * t + 10 * layer + k).float(), features, labels)


def test_windows_hold_the_last_snapshots_of_one_layer():
    runs = WindowSet((run_of("a", 4, 2), run_of("b", 3, 1, start=1000)), window=3)
    assert runs.index.tolist() == [[0, 2, 0], [0, 2, 1], [0, 3, 0], [0, 3, 1], [1, 2, 0]]
    assert len(runs) == 5
    windows, features, labels = runs.batch(torch.tensor([3, 4]))
    assert windows.tolist() == [[[110, 111], [210, 211], [310, 311]], [[1000, 1001], [1100, 1101], [1200, 1201]]]
    assert features[0, :, 0].tolist() == pytest.approx([1 / 3, 2 / 3, 1])
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


def test_after_a_drop_of_the_rate_no_window_reaches_back_behind_it(make_windows):
    (run, *_) = make_windows(each=1, snapshots=12, layers=2).runs
    dropped = replace(run, length_T=torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8]))
    windows = WindowSet((dropped,), 3)
    assert windows.index[::2, 1].tolist() == [2, 3, 6, 7, 8, 9, 10, 11]
    assert torch.equal(windows.labels_N, dropped.labels_TL[windows.index[:, 1], windows.index[:, 2]])
    assert torch.equal(windows.features_NF("progress")[::2, 0] * 11, torch.tensor([2, 3, 6, 7, 8, 9, 10, 11.0]))
    config = replace(CONFIG, window=3)
    weights, features, _ = windows.batch(torch.arange(len(windows)))
    assert torch.allclose(kept_tokens(windows, config), tokens_of(config, weights, features), atol=1e-6)
    assert len(WindowSet((dropped, run), 9)) == 2 * 4  # the whole run alone has windows as long


@pytest.mark.parametrize("inputs", ["gain", "motion", "raw"])
def test_tokens_are_those_of_the_windows_one_by_one(make_windows, inputs):
    windows = make_windows(each=1)
    config = replace(CONFIG, inputs=inputs, weights=16)
    tokens = Tokens(windows, config)
    indices = torch.tensor([0, 5, len(windows) - 1, 17])
    weights, features, labels = windows.batch(indices)
    assert torch.allclose(tokens[indices], tokens_of(config, weights, features), atol=1e-6)
    assert torch.equal(tokens.labels_N[indices], labels)
    assert sum(len(part) for part in tokens.chunks(100)) == len(windows) == len(tokens)


@pytest.mark.parametrize(("inputs", "weights"), [("gain", 32), ("gain", 20), ("motion", 7)])
@pytest.mark.parametrize("pieces_of", [0, 1, 3, 17, 50])
def test_tokens_made_piece_by_piece_are_those_made_at_once_bit_for_bit(
    make_windows, monkeypatch, inputs, weights, pieces_of
):
    windows, config = make_windows(each=2), replace(CONFIG, inputs=inputs, weights=weights)
    at_once, most, sizes = kept_tokens(windows, config), pieces_of * windows.window * weights, []

    def noting(config, weights_BWK, features_BWF):
        sizes.append(weights_BWK.numel())
        return tokens_of(config, weights_BWK, features_BWF)

    monkeypatch.setattr("predictor.training.dataset._MOST_WEIGHTS", most)
    monkeypatch.setattr("predictor.training.dataset.tokens", noting)
    assert torch.equal(kept_tokens(windows, config), at_once)
    assert max(sizes) <= max(most, windows.window * weights)


def test_windows_are_not_copied_before_they_are_made_tokens_of(make_windows):
    (run, *_) = make_windows(each=1).runs
    for weights_BWK, features_BWF in _pieces(run, 6, 32):
        assert weights_BWK.untyped_storage().data_ptr() == run.weights_TLK.untyped_storage().data_ptr()
        assert features_BWF.untyped_storage().data_ptr() == run.features_TLF.untyped_storage().data_ptr()


def test_tokens_pass_over_runs_that_are_too_short(make_windows):
    short = make_windows(each=1, snapshots=12, window=6)
    mixed = WindowSet((*make_windows(each=1, first=9).runs, *short.runs), 20)
    assert len(kept_tokens(mixed, replace(CONFIG, weights=32))) == len(mixed) == 3 * 5 * 4

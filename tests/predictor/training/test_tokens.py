"""Tokens of every window: those that a window gives alone, whatever is made of how many at once."""

from dataclasses import replace

import pytest
import torch

from predictor.model.network import FreezePredictor, PredictorConfig
from predictor.training.tokens import Tokens, _pieces, kept_tokens
from predictor.training.windows import WindowSet

CONFIG = PredictorConfig(window=6, weights=32, hidden=16, key=8)


@pytest.mark.parametrize("inputs", ["gain", "motion", "raw"])
def test_tokens_are_those_of_the_windows_one_by_one(make_windows, inputs):
    windows = make_windows(each=1)
    config = replace(CONFIG, inputs=inputs, weights=16)
    tokens = Tokens(windows, config)
    places = torch.tensor([0, 5, len(windows) - 1, 17])
    cut, signals, labels = windows.batch(places)
    assert torch.allclose(tokens[places], FreezePredictor(config).tokens(cut, signals), atol=1e-6)
    assert torch.equal(tokens.labels_N[places], labels)
    assert sum(len(part) for part in tokens.chunks(100)) == len(windows) == len(tokens)


@pytest.mark.parametrize(("inputs", "weights"), [("gain", 32), ("gain", 20), ("motion", 7)])
@pytest.mark.parametrize("pieces_of", [0, 1, 3, 17, 50])
def test_tokens_made_piece_by_piece_are_those_made_at_once_bit_for_bit(
    make_windows, monkeypatch, inputs, weights, pieces_of
):
    windows, config = make_windows(each=2), replace(CONFIG, inputs=inputs, weights=weights)
    at_once, most, sizes = kept_tokens(windows, config), pieces_of * windows.window * weights, []
    make_tokens = FreezePredictor.tokens

    def noting(self, windows_BWK, signals_BWS):
        sizes.append(windows_BWK.numel())
        return make_tokens(self, windows_BWK, signals_BWS)

    monkeypatch.setattr("predictor.training.tokens._MOST_WEIGHTS", most)
    monkeypatch.setattr(FreezePredictor, "tokens", noting)
    assert torch.equal(kept_tokens(windows, config), at_once)
    assert max(sizes) <= max(most, windows.window * weights)


def test_windows_are_not_copied_before_they_are_made_tokens_of(make_windows):
    (run, *_) = make_windows(each=1).runs
    for windows_BWK, signals_BWS in _pieces(run, 6, 32):
        assert windows_BWK.untyped_storage().data_ptr() == run.weights_TLK.untyped_storage().data_ptr()
        assert signals_BWS.untyped_storage().data_ptr() == run.signals_TLS.untyped_storage().data_ptr()


def test_tokens_pass_over_runs_that_are_too_short(make_windows):
    short = make_windows(each=1, snapshots=12, window=6)
    mixed = WindowSet((*make_windows(each=1, first=9).runs, *short.runs), 20)
    assert len(kept_tokens(mixed, replace(CONFIG, weights=32))) == len(mixed) == 3 * 5 * 4

"""From files to labelled windows."""

import math

import numpy as np
import pytest
import torch

from data.trajectories import LabelRule, windows_from, write_runs
from data.trajectories.windows import spec_of
from predictor.errors import FileFault, UsageError
from predictor.sampling import SampleSpec
from tests.data.made import made_trajectory


def diverged(run_id):
    return made_trajectory(run_id, outcome={"status": "diverged"}, similarity_TL=np.full((5, 3), np.nan, np.float32))


def test_windows_hold_weights_signals_and_labels():
    windows = windows_from([made_trajectory()], 2)
    assert windows.window == 2
    assert len(windows) == 4 * 3  # snapshots 1 to 4 of three layers
    (run,) = windows.runs
    assert (run.run_id, run.family, run.source) == ("mlp-0", "mlp", "digits")
    assert run.labels_TL.dtype == torch.bool
    assert run.labels_TL.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    places = torch.tensor([[0, 2, 1]])
    assert windows.index[4:5].tolist() == places.tolist()
    windows_BWK, signals_BWS, labels_B = windows.batch(torch.tensor([4]))
    # Weights count up over snapshots, layers and samples: (1 * 3 + 1) * 4 = 16 and (2 * 3 + 1) * 4 = 28.
    assert windows_BWK.tolist() == [[[16, 17, 18, 19], [28, 29, 30, 31]]]
    assert labels_B.tolist() == [True]
    expected = [[0.25, 0.5, math.log(0.75)], [0.5, 0.5, math.log(0.5)]]
    torch.testing.assert_close(signals_BWS[0], torch.tensor(expected))


def test_files_folders_and_trajectories_give_the_same(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory("a"), made_trajectory("b")])
    write_runs(tmp_path / "folder" / "runs" / "c.h5", [made_trajectory("c")])
    windows = windows_from([tmp_path / "t.h5", str(tmp_path / "folder"), made_trajectory("d")], 3)
    assert [run.run_id for run in windows.runs] == ["a", "b", "c", "d"]
    for run in windows.runs:
        torch.testing.assert_close(run.weights_TLK, windows.runs[0].weights_TLK)
        torch.testing.assert_close(run.signals_TLS, windows.runs[0].signals_TLS)
    assert [run.run_id for run in windows_from(tmp_path / "t.h5", 3).runs] == ["a", "b"]


def test_the_rule_labels():
    similarity_TL = np.full((5, 3), 0.6, dtype=np.float32)
    run = made_trajectory(similarity_TL=similarity_TL)
    assert not windows_from([run], 2).labels_N.any()
    assert windows_from([run], 2, LabelRule(threshold=0.5)).labels_N.all()


def test_runs_that_diverged_or_are_short_are_left_out():
    runs = [diverged("a"), made_trajectory("b"), made_trajectory("short", snapshots=2)]
    runs[2].config["sampling"] = runs[1].config["sampling"]
    assert [run.run_id for run in windows_from(runs, 3).runs] == ["b"]


def test_a_layer_without_a_similarity_is_left_out_of_its_run():
    similarity_TL = np.ones((5, 3), dtype=np.float32)
    similarity_TL[2, 1] = np.nan
    windows = windows_from([made_trajectory("a", similarity_TL=similarity_TL), made_trajectory("b")], 2)
    first, second = windows.runs
    assert first.labels_TL.shape == (5, 2)
    torch.testing.assert_close(first.weights_TLK, second.weights_TLK[:, [0, 2]])
    assert first.signals_TLS[0, :, 1].tolist() == [0, 1]  # the third layer's depth is still that of the last


@pytest.mark.parametrize("runs", [[], [diverged("a")], [made_trajectory(snapshots=2)]])
def test_nothing_to_learn_from(runs):
    with pytest.raises(UsageError, match="no finished run has 3 snapshots"):
        windows_from(runs, 3)


def test_a_run_twice_would_be_on_both_sides_of_a_split(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory("a")])
    with pytest.raises(UsageError, match="run a: comes twice"):
        windows_from([tmp_path / "t.h5", tmp_path / "t.h5"], 2)


def test_runs_that_were_sampled_differently_are_refused():
    with pytest.raises(UsageError, match=r"runs a and b were sampled differently .*weights=4.*weights=5"):
        windows_from([made_trajectory("a"), made_trajectory("b", weights=5)], 2)


def test_how_a_run_was_sampled():
    assert spec_of(made_trajectory()) == SampleSpec(weights=4, snapshots=4, seed=0)


def test_a_fault_names_the_file(tmp_path):
    with pytest.raises(FileFault, match=r"none.h5: there is no such file"):
        windows_from(tmp_path / "none.h5", 2)

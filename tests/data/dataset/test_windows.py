"""From files to labelled windows."""

import math

import numpy as np
import pytest
import torch

from collect.workloads import WORKLOADS
from data.dataset.windows import SHIPPED_SPLIT, OutcomeRule, part_of, spec_of, windows_from
from data.outcomes.accuracy_cost import AccuracyCost
from data.sources import SOURCES
from data.trajectories import LabelRule, write_runs
from predictor.errors import FileFault, UsageError
from predictor.model.sampling import SampleSpec
from predictor.training.splits import HeldOut, read_held_out
from tests.data.made import made_trajectory


def diverged(run_id):
    return made_trajectory(run_id, outcome={"status": "diverged"}, similarity_TL=np.full((5, 3), np.nan, np.float32))


def test_windows_hold_weights_features_and_labels():
    windows = windows_from([made_trajectory()], 2)
    assert windows.window == 2
    assert len(windows) == 4 * 3  # snapshots 1 to 4 of three layers
    (run,) = windows.runs
    assert (run.run_id, run.family, run.source) == ("mlp-0", "mlp", "digits")
    assert run.labels_TL.dtype == torch.bool
    assert run.labels_TL.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert windows.index[4].tolist() == [0, 2, 1]
    windows_BWK, features_BWF, labels_B = windows.batch(torch.tensor([4]))
    # Weights count up over snapshots, layers and samples: (1 * 3 + 1) * 4 = 16 and (2 * 3 + 1) * 4 = 28.
    assert windows_BWK.tolist() == [[[16, 17, 18, 19], [28, 29, 30, 31]]]
    assert labels_B.tolist() == [True]
    expected = [[0.25, 0.5, math.log(0.75)], [0.5, 0.5, math.log(0.5)]]
    torch.testing.assert_close(features_BWF[0, :, :3], torch.tensor(expected))
    assert features_BWF.isfinite().all()


def test_files_folders_and_trajectories_give_the_same(tmp_path):
    write_runs(tmp_path / "t.h5", [made_trajectory("a"), made_trajectory("b")])
    write_runs(tmp_path / "folder" / "runs" / "c.h5", [made_trajectory("c")])
    windows = windows_from([tmp_path / "t.h5", str(tmp_path / "folder"), made_trajectory("d")], 3)
    assert [run.run_id for run in windows.runs] == ["a", "b", "c", "d"]
    for run in windows.runs:
        torch.testing.assert_close(run.weights_TLK, windows.runs[0].weights_TLK)
        torch.testing.assert_close(run.features_TLF, windows.runs[0].features_TLF)
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
    assert first.features_TLF[0, :, 1].tolist() == [0, 1]  # the third layer's depth is still that of the last


@pytest.mark.parametrize("runs", [[], [diverged("a")], [made_trajectory(snapshots=2)]])
def test_nothing_to_learn_from(runs):
    with pytest.raises(UsageError, match=r"no finished run .* has 3 snapshots"):
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


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 10**30}, {"snapshots": 0}])
def test_a_run_that_cannot_have_been_sampled_so_is_named(wrong):
    run = made_trajectory("a")
    run.config["sampling"].update(wrong)
    with pytest.raises(UsageError, match=r"run a: its sampling .*: leave it out"):
        windows_from([run], 2)


def test_a_fault_names_the_file(tmp_path):
    with pytest.raises(FileFault, match=r"none.h5: there is no such file"):
        windows_from(tmp_path / "none.h5", 2)


def run_of(run_id, family, source):
    run = made_trajectory(run_id)
    run.config.update(family=family, source=source)
    return run


MIXED = [
    run_of("a", "mlp", "digits"),
    run_of("b", "resnet", "digits"),
    run_of("c", "mlp", "fashion-last"),
    run_of("d", "vit", "glosses"),
]


def ids(windows):
    return [run.run_id for run in windows.runs]


def test_what_is_held_out_is_given_to_who_asks_for_it_by_name_alone():
    assert ids(windows_from(MIXED, 2)) == ids(part_of("learning", MIXED, 2)) == ["a", "d"]
    assert ids(part_of("held-out", MIXED, 2)) == ["b", "c"]
    assert ids(windows_from(MIXED, 2, held_out=HeldOut(families=("vit",)))) == ["a", "b", "c"]
    assert ids(part_of("held-out", MIXED, 2, held_out=HeldOut(sources=("digits",)))) == ["a", "b"]
    assert ids(windows_from(MIXED, 2, held_out=HeldOut())) == ["a", "b", "c", "d"]
    assert ids(part_of("held-out", MIXED, 2, held_out=HeldOut())) == []
    labels = part_of("held-out", MIXED, 2, LabelRule(threshold=1.0)).labels_N
    assert torch.equal(labels, windows_from(MIXED[:1] + MIXED[3:], 2).labels_N)
    with pytest.raises(UsageError, match="there is no part 'test': there are learning, held-out"):
        part_of("test", MIXED, 2)


def test_if_all_runs_are_held_out_there_is_nothing_to_train_on():
    with pytest.raises(UsageError, match=r"no finished run that is not held out .* --held-out"):
        windows_from(MIXED[1:3], 2)


def test_runs_of_both_parts_must_go_together():
    with pytest.raises(UsageError, match="run a: comes twice"):
        windows_from([MIXED[0], run_of("a", "resnet", "digits")], 2)
    odd = made_trajectory("b", weights=5)
    odd.config["family"] = "resnet"
    with pytest.raises(UsageError, match="runs a and b were sampled differently"):
        windows_from([MIXED[0], odd], 2)


def test_the_shipped_split_names_what_there_is_and_all_that_is_made_of_it():
    shipped = read_held_out(SHIPPED_SPLIT)
    made = {name: make() for name, make in WORKLOADS.items()}
    assert set(shipped.families) <= {workload.family for workload in made.values()}
    assert set(shipped.sources) <= set(SOURCES)
    fashion = {name for name in SOURCES if "fashion" in name}
    halves = [f"{name}-{half}" for name in SOURCES for half in ("first", "last")]
    assert set(shipped.among([], [*SOURCES, *halves])) == fashion | {name for name in halves if "fashion" in name}
    held = {name for name, workload in made.items() if shipped.holds(workload.family, workload.source)}
    pretrained = {name for name in made if name.startswith(("lite", "minilm"))}
    assert {name for name in made if "fashion" in name or name.startswith(("resnet", "mobilenet"))} < held
    assert pretrained < held
    assert {"mlp-digits", "vgg-digits", "vit-digits", "textcnn-glosses"} <= set(made) - held


def cost_of(run_id, total_steps, layers=3):
    """Freezing one layer at the start costs a point and all of them nine, half of it at half of the training."""
    cost_PF = np.array([[0.0, 1.0, 9.0], [0.0, 0.0, 0.0]])
    return AccuracyCost(
        run_id,
        total_steps,
        layers,
        step_P=np.array([0, total_steps]),
        prefix_F=np.array([0, 1, layers]),
        cost_PF=cost_PF,
        flops_F=np.array([1.0, 0.8, 0.4]),
        signed_PF=cost_PF,
    )


def test_outcomes_label_what_costs_little_and_leave_out_what_is_not_known():
    runs = [made_trajectory("a"), made_trajectory("b")]
    total = runs[0].config["total_steps"]
    rule = OutcomeRule({"b": cost_of("b", total)}, tolerance=1.0)
    (run,) = windows_from(runs, 2, rule).runs
    assert run.run_id == "b"
    # The root of the points is linear: 1, 2, 3 over the layers at the start, three quarters of it at the next snapshot.
    share_T = 1 - runs[0].step_T / total
    expected_TL = (share_T[:, None] * np.array([1.0, 2.0, 3.0])) ** 2
    assert np.allclose(run.cost_TL, expected_TL)
    assert run.labels_TL.tolist() == (expected_TL <= 1.0).tolist()
    assert run.flops_F.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4])
    with pytest.raises(UsageError, match="has both 2 snapshots and outcomes"):
        windows_from([made_trajectory("a")], 2, rule)
    with pytest.raises(UsageError, match="run b: its outcomes are of a training of"):
        windows_from(runs, 2, OutcomeRule({"b": cost_of("b", total + 1)}))

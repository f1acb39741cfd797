"""Labels beside outcomes: the right step, the right layers, and figures by hand."""

from dataclasses import replace

import numpy as np
import pytest

from data.__main__ import main
from data.dataset.cka_agreement import THRESHOLDS, describe_outcomes, harmless, join, noise_of
from data.outcomes.records import write_outcomes
from data.trajectories import LabelRule, write_runs
from predictor.errors import FileFault, UsageError
from tests.data.made import made_trajectory
from tests.data.made_outcomes import ended, made_outcome, made_run


@pytest.mark.parametrize(
    ("step", "snapshot"), [(0, 0), (9, 0), (10, 1), (11, 1), (30, 3), (39, 3)]
)  # snapshots at 0, 10, 20, 30 and 40
def test_an_outcome_meets_the_last_snapshot_that_was_taken_by_its_step(step, snapshot):
    trajectory = made_trajectory(similarity_TL=np.linspace(0, 1, 15, dtype=np.float32).reshape(5, 3))
    (joined,) = join([made_outcome(step=step)], [trajectory])
    np.testing.assert_array_equal(joined.similarity_TL, trajectory.similarity_TL[snapshot:, :2])


def test_labels_are_those_of_the_whole_trajectory_at_that_step_and_layer():
    generator = np.random.default_rng(0)
    similarity_TL = generator.uniform(0.9, 1, (5, 3)).astype(np.float32)
    similarity_TL[2, 1] = np.nan
    trajectory = made_trajectory(similarity_TL=similarity_TL)
    outcomes = [made_outcome("single", step, (layer,)) for step in (0, 10, 20, 30) for layer in range(3)]
    joined = join(outcomes, [trajectory])
    assert [labelled.outcome for labelled in joined] == outcomes
    for threshold in (0.9, 0.92, 0.95, 0.98):
        for rule in (LabelRule(threshold), LabelRule(threshold, dip=0.03)):
            labels_TL = rule.labels(similarity_TL)[:4]
            assert [labelled.freezable(rule) for labelled in joined] == [(bool(label),) for label in labels_TL.flat]


def test_the_lowest_similarity_is_the_highest_threshold_that_still_calls_all_freezable():
    generator = np.random.default_rng(1)
    trajectory = made_trajectory(similarity_TL=generator.uniform(0.5, 1, (5, 3)).astype(np.float32))
    for labelled in join([made_outcome(step=step) for step in (0, 10, 20, 30)], [trajectory]):
        assert all(labelled.freezable(LabelRule(labelled.lowest)))
        assert not all(labelled.freezable(LabelRule(labelled.lowest + 1e-4)))
    nothing = made_trajectory(similarity_TL=np.full((5, 3), np.nan, dtype=np.float32))
    (unknown,) = join([made_outcome()], [nothing])
    assert unknown.lowest == -1
    assert unknown.freezable(LabelRule()) == (False, False)


def test_only_layers_frozen_in_runs_that_finished_are_joined_and_each_run_once(tmp_path):
    outcomes = [*made_run(s10_2=0.6), *made_run("mlp-1", s10_2=0.6), *made_run("mlp-2", s10_1=0.6)]
    lost = made_trajectory("mlp-1", outcome={"status": "diverged"}, similarity_TL=np.full((5, 3), np.nan, np.float32))
    write_runs(tmp_path / "t.h5", [made_trajectory("mlp-0"), lost])
    for sources in (tmp_path / "t.h5", [tmp_path / "t.h5", tmp_path / "t.h5"]):
        assert [labelled.outcome.key for labelled in join(outcomes, sources)] == [("mlp-0", 10, "front", (0, 1))]


def test_another_run_under_the_same_id_is_refused():
    named = made_trajectory(layer_names=("layers.0", "other", "layers.2"))
    with pytest.raises(UsageError, match=r"layer 1 is 'other' in its trajectory, 'layers.1' in its outcomes"):
        join([made_outcome()], [named])
    with pytest.raises(UsageError, match="layer 2 is None in its trajectory"):
        join([made_outcome(layers=(2,))], [made_trajectory(layers=2)])
    with pytest.raises(UsageError, match="40 steps in its trajectory and 30 in its outcomes"):
        join([made_outcome(total_steps=30)], [made_trajectory()])


def test_noise_is_the_root_mean_square_and_what_exceeds_it_is_not_harmless():
    outcomes = [*made_run(noise=0.3), *made_run("mlp-1", noise=0.1)]
    outcomes.append(made_outcome("noise", 30, (), result=ended(None)))
    noise = noise_of(outcomes)
    assert noise == pytest.approx({"mlp-0": 0.3, "mlp-1": 0.1})
    worse = made_outcome(result=ended(0.7))
    assert harmless(worse, noise)
    assert not harmless(replace(worse, run_id="mlp-1"), noise)
    assert harmless(replace(worse, run_id="mlp-1"), noise, times=2.1)
    assert not harmless(made_outcome(result=ended(None)), noise, times=1e9)


def rows_of(text, block):
    """The lines of the block that begins with a word, split, by their first columns."""
    (part,) = (part for part in text.split("\n\n") if part.startswith(block))
    return [line.split() for line in part.splitlines()]


def test_the_figures_of_a_summary():
    # Layer p reaches a similarity of 1 at step 10 p and keeps it: any threshold's label of the first n layers is
    # "step >= 10 (n - 1)". Of the four prefixes so labelled one was not harmless; of the two others one was.
    run = made_run(s0_1=0.5, s10_2=0.55, s20_3=0.9, s30_3=0.4, s0_2=0.8, s10_3=0.45)
    single = made_outcome("single", 20, (1,), result=ended(None))
    text = describe_outcomes([*run, single], [made_trajectory()])
    assert "1 runs, 0 of them diverged; 7 continuations with frozen layers, 1 of them diverged" in text
    assert "20.0% of the loss" in text
    head, *rules, itself, progress = rows_of(text, "prefixes")
    assert head[:4] == ["prefixes:", "6,", "67%", "harmless"]
    assert len(rules) == len(THRESHOLDS)
    # AUROC of a yes or no: the mean of the shares found, 3 of 4 harmless and 1 of 2 harmful.
    assert {tuple(row[4:]) for row in rules} == {("4", "1", "1", "0.625")}
    assert itself[-1] == "0.625"
    # Harmless at 0, 10, 10, 30, harmful at 0, 20: of 8 pairs, harmless is later in 4, and in one they are equal.
    assert progress == ["progress", "alone", "0.562"]
    assert rows_of(text, "singles")[0][:4] == ["singles:", "1,", "0%", "harmless"]
    assert rows_of(text, "singles")[1][-1] == "n/a"
    shares = {" ".join(row[:-4]): row[-4:] for row in rows_of(text, "harmless, frozen")}
    assert shares["harmless, frozen from progress"] == ["0.00", "0.25", "0.50", "0.75"]
    assert shares["a prefix of about 1/4"] == ["1/1", "n/a", "n/a", "n/a"]
    assert shares["a prefix of about 3/4"] == ["0/1", "1/1", "n/a", "n/a"]
    assert shares["all layers"] == ["n/a", "1/1", "0/1", "1/1"]
    assert shares["a single layer"] == ["n/a", "n/a", "0/1", "n/a"]


def test_a_prefix_of_less_than_an_eighth_is_not_taken_for_a_quarter():
    fronts = [made_outcome("front", 0, tuple(range(count)), layer_count=9) for count in (1, 2)]
    text = describe_outcomes([*fronts, made_outcome("noise", 0, (), layer_count=9)])
    assert "a smaller prefix" in text
    assert "a prefix of about 1/4" in text


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UsageError, match="times=-1"):
        describe_outcomes(made_run(s10_2=0.6), times=-1)
    with pytest.raises(UsageError, match="no run has both layers frozen and noise"):
        describe_outcomes([made_outcome()])
    with pytest.raises(UsageError, match="none of these runs is among the trajectories"):
        describe_outcomes(made_run(s10_2=0.6), [made_trajectory("other")])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFault, match=r"runs/outcomes.jsonl: cannot be read"):
        main(["outcomes"])
    write_outcomes(tmp_path / "runs" / "outcomes.jsonl", [*made_run(s10_2=0.6), *made_run("mlp-1", s20_2=0.9)])
    assert main(["outcomes"]) == 0
    assert "CKA" not in capsys.readouterr().out
    write_runs(tmp_path / "t.h5", [made_trajectory()])
    assert main(["outcomes", "runs/outcomes.jsonl", "--trajectories", "t.h5", "--times", "2"]) == 0
    text = capsys.readouterr().out
    assert "at most 2 times the noise" in text
    assert "1 continuations; 1 runs have no trajectory there" in text

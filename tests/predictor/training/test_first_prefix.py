"""Fitting what a prefix costs that freezes before the first step, on runs whose cost is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from evaluate.trials.folder import PUBLISHED
from predictor.__main__ import main
from predictor.errors import FileFault, UsageError
from predictor.model.file import load_predictor
from predictor.model.first_look import FirstLook
from predictor.model.first_prefix import COST_FLOOR, MOST_COST, PrefixModel
from predictor.policies.smartfrz import SHIPPED
from predictor.training.card import first_prefix_text
from predictor.training.first_prefix import FirstPrefixes, fit_first_prefix, predict_unseen, replay
from predictor.training.thresholds import RISKS


def run(family, number, scale=4.9, first=0.5):
    """A run of ten layers that costs `scale` percentage points times the prefix's share of the gradient.

    first: what the first layer's gradient is multiplied with.
    """
    draw = np.random.default_rng([ord(family), number])
    mean = draw.uniform(0.5, 1.5, size=10)
    mean[0] *= first
    flat = (1.0,) * 10
    look = FirstLook(8, tuple(mean), flat, flat, flat, flat, flat, (100,) * 10)
    share = mean.cumsum() / mean.sum()
    step_F = np.linspace(1, 0.3, 11)
    return FirstPrefixes(family, family, look, 95 + number, np.arange(1, 11), scale * share, step_F, scale * share)


RUNS = [run(family, number) for family in "abcd" for number in range(6)]


def test_it_finds_the_rule_that_made_the_costs():
    model, card = fit_first_prefix(RUNS)
    predicted = np.concatenate([model.costs(each.look, each.steps) for each in RUNS])
    true = np.concatenate([each.cost_F for each in RUNS])
    clear = (true > 5 * COST_FLOOR) & (true < MOST_COST)
    assert predicted[clear] == pytest.approx(true[clear], rel=0.25)
    assert model.weights["gradient"] + model.weights["depth"] == pytest.approx(1, abs=0.2)
    assert card["runs"] == 24
    assert model.fewest_steps == card["fewest_steps"] == 95
    assert card["families"] == dict.fromkeys("abcd", 6)


def test_families_left_out_keep_to_their_part_of_the_risk():
    model, card = fit_first_prefix(RUNS)
    assert [risk for risk, _ in model.allowances] == list(RISKS)
    allowed = [cost for _, cost in model.allowances]
    assert allowed == sorted(allowed)
    for row in card["replays"]:
        assert row["points"] <= row["risk"] / 2
    assert card["replays"][-1]["flops"] < card["replays"][0]["flops"] < 1


def test_the_replay_by_hand():
    """Of two families one freezes what its model allows, and pays what that cost; the other may freeze nothing."""
    one, other = run("a", 0), run("c", 0)
    model, _ = fit_first_prefix(RUNS)
    first, second = predict_unseen([one, other], {"a": model, "c": PrefixModel(100.0)})
    assert first.cost_L == pytest.approx(model.costs(one.look, one.steps))
    allowed = float(first.cost_L[4:6].mean())
    assert first.freezes(allowed) == 5
    # The predictions may be off by half: five factors, evenly spread in their logarithm.
    sizes = [first.freezes(allowed * 1.5**power) for power in (-1, -0.5, 0, 0.5, 1)]
    assert sizes[0] < sizes[2] == 5 < sizes[-1]
    lost, left = replay([first, second], allowed)
    assert lost == pytest.approx(np.mean([one.cost_F[size - 1] for size in sizes]) / 2)
    assert left == pytest.approx((np.mean([one.step_F[size] for size in sizes]) + 1) / 2)
    assert replay([first, second], 0.0) == (0.0, 1.0)


def with_evidence(each, *evidence):
    return replace(each, look=replace(each.look, evidence_L=evidence))


def test_only_what_may_freeze_counts_in_what_may_be_risked():
    """A layer that has learned nothing ends the prefix; runs whose first layer has learned nothing are left out."""
    half = with_evidence(RUNS[0], *[50.0] * 5, *[0.0] * 5)
    (first,) = predict_unseen([half], {"a": PrefixModel(-9.0)})
    assert first.freezes(100.0) == 5

    random = [with_evidence(run(family, 9, scale=40.0), *[0.0] * 10) for family in "abcd"]
    model, card = fit_first_prefix(RUNS + random)
    assert (card["runs"], card["replayed"]) == (28, 24)
    unready = "of 4 runs 0, of 0 families, have layers that are of use with random weights"
    with pytest.raises(UsageError, match=unready):
        fit_first_prefix(random)
    assert replay(predict_unseen(random, dict.fromkeys("abcd", model)), 100.0) == (0.0, 1.0)


def test_one_family_is_too_few():
    with pytest.raises(UsageError, match="of 6 runs 6, of 1 families"):
        fit_first_prefix(RUNS[:6])


def test_runs_whose_first_layers_have_not_settled_lose_nothing_and_save_nothing():
    """They are no part of the line. Among as many others, twice as much may be risked there."""
    alone, _ = fit_first_prefix(RUNS)
    restless = [run(family, number, scale=40.0, first=5.0) for family in "efgh" for number in range(6)]
    assert min(each.look.early_share for each in restless) > 1 > max(each.look.early_share for each in RUNS)
    model, card = fit_first_prefix(RUNS + restless)
    assert (model.intercept, model.weights) == (alone.intercept, alone.weights)
    assert (card["runs"], card["fitted"], card["replayed"]) == (48, 24, 48)
    assert dict(model.allowances)[0.5] == pytest.approx(dict(alone.allowances)[1.0], rel=0.05)


def test_it_finds_what_the_length_does():
    """Costs that fall with the square root of the steps."""
    lengths = ((4**number, each) for number, each in zip(itertools.cycle(range(3)), RUNS, strict=False))
    model, _ = fit_first_prefix([replace(each, steps=100 * n, cost_F=each.cost_F / n**0.5) for n, each in lengths])
    assert model.weights["steps"] == pytest.approx(-0.5, abs=0.1)
    assert (model.fewest_steps, model.most_steps) == (100, 1600)


def test_of_a_family_those_that_have_settled_count_in_the_line():
    mixed = [run("e", number, scale=40.0, first=5.0 if number % 2 else 0.5) for number in range(6)]
    model, card = fit_first_prefix(RUNS + mixed)
    settled, _ = fit_first_prefix(RUNS + mixed[::2])
    assert (model.intercept, model.weights) == (settled.intercept, settled.weights)
    assert (card["runs"], card["fitted"], card["replayed"]) == (30, 27, 30)


def test_the_published_outcomes_make_what_ships(tmp_path, capsys):
    outcomes = [PUBLISHED.parent / "outcomes" / f"{name}.jsonl.gz" for name in ("prefixes", "prefixes-short")]
    main(["prefix", "--outcomes", *map(str, outcomes), "--out", str(tmp_path / "p.safetensors")])
    said = capsys.readouterr().out
    made, ships = load_predictor(tmp_path / "p.safetensors"), load_predictor(SHIPPED)
    assert made.prefix.weights == pytest.approx(ships.prefix.weights)
    assert made.prefix.intercept == pytest.approx(ships.prefix.intercept)
    assert np.array(made.prefix.allowances) == pytest.approx(np.array(ships.prefix.allowances), rel=0.05)
    assert (made.prefix.fewest_steps, made.prefix.most_steps) == (ships.prefix.fewest_steps, ships.prefix.most_steps)
    assert made.card["first_prefix"]["files"] == [path.name for path in outcomes]
    assert f"In trainings of fewer than {ships.prefix.fewest_steps} steps no layer freezes" in said


def test_the_published_outcomes_from_scratch_make_what_ships(tmp_path, capsys):
    outcomes = PUBLISHED.parent / "outcomes" / "prefixes-scratch.jsonl.gz"
    main(["prefix", "--scratch", "--outcomes", str(outcomes), "--out", str(tmp_path / "p.safetensors")])
    said = capsys.readouterr().out
    made, ships = load_predictor(tmp_path / "p.safetensors").prefix, load_predictor(SHIPPED).prefix
    assert replace(made, scratch=None) == replace(ships, scratch=None)  # what others cost stays as it was
    assert made.scratch.weights == pytest.approx(ships.scratch.weights)
    assert np.array(made.scratch.allowances) == pytest.approx(np.array(ships.scratch.allowances), rel=0.05)
    few, many = made.scratch.fewest_steps, made.scratch.most_steps
    assert (few, many) == (ships.scratch.fewest_steps, ships.scratch.most_steps)
    assert f"From scratch, in trainings of fewer than {few} steps or more than {many:,} no layer freezes" in said


def from_scratch(each, ready=10):
    """The same run, with weights that have learned nothing and so many layers that are of use so."""
    unready = (False,) * ready + (True,) * (10 - ready)
    return replace(each, look=replace(each.look, evidence_L=(0.0,) * 10, unready_L=unready))


def test_from_scratch_those_that_may_freeze_count_alone():
    random = [from_scratch(each) for each in RUNS]
    model, card = fit_first_prefix(random)
    other, _ = fit_first_prefix(RUNS)
    assert model.weights == pytest.approx(other.weights)
    assert model.allowances == other.allowances
    unready = [from_scratch(run("e", number, scale=40.0), ready=0) for number in range(6)]
    with_others, card = fit_first_prefix(random + unready)
    assert with_others == model
    assert (card["runs"], card["fitted"], card["replayed"]) == (30, 24, 24)


def test_chance_that_is_below_zero_counts_in_what_may_be_risked():
    noise = np.random.default_rng(0).normal(0, 0.5, size=(len(RUNS), 10))
    measured = [replace(each, lost_F=each.cost_F + own) for each, own in zip(RUNS, noise, strict=True)]
    cut = [replace(each, lost_F=each.lost_F.clip(0)) for each in measured]
    allowed = [dict(fit_first_prefix(runs)[0].allowances)[0.5] for runs in (RUNS, measured, cut)]
    assert allowed[1] == pytest.approx(allowed[0], rel=0.3)
    assert allowed[2] < 0.9 * allowed[1]  # cut off, chance is taken for a cost


def test_a_file_in_the_way_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("predictor.training.first_prefix.fit_first_prefix", lambda runs: (PrefixModel(0.0), {}))
    (tmp_path / "file").touch()
    outcomes = PUBLISHED.parent / "outcomes" / "prefixes.jsonl.gz"
    with pytest.raises(FileFault, match=r"file.x.p\.safetensors: cannot be written"):
        main(["prefix", "--outcomes", str(outcomes), "--out", str(tmp_path / "file" / "x" / "p.safetensors")])


def test_the_card_of_an_earlier_version_says_from_how_many_steps_on():
    figures = {"runs": 60, "replayed": 26, "fewest_steps": 176, "most_steps": 528, "replays": []}
    said = first_prefix_text({"first_prefix": {**figures, "shorter": {"runs": 48, "fewest_steps": 88}}})
    assert "learned from 60 runs" in said
    assert "In trainings of fewer than 88 steps" in said
    assert "In trainings of fewer than 176 steps" in first_prefix_text({"first_prefix": figures})
    assert first_prefix_text({}) == ""

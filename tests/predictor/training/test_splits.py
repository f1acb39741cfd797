"""Runs are split whole, family by family."""

import math
import random
from collections import Counter

import pytest

from predictor.errors import UsageError
from predictor.training.dataset import RunWindows
from predictor.training.splits import HeldOut, family_folds, read_held_out, runs_of, split_by_run


def made_runs(**counts):
    rows = [(family, f"{family}{number}") for family, count in counts.items() for number in range(count)]
    return [RunWindows(run_id, family, "digits", None, None, None) for family, run_id in rows]


def test_every_run_is_in_exactly_one_part():
    split = split_by_run(made_runs(a=7, b=1, c=4), 0.2, 0.3, seed=0)
    assert sorted((*split.train, *split.validation, *split.test)) == list(range(12))
    assert (len(split.train), len(split.validation), len(split.test)) == (6, 2, 4)


@pytest.mark.parametrize("seed", range(5))
def test_each_family_gives_its_share_to_every_part(seed):
    runs = made_runs(a=10, b=5, c=20)
    split = split_by_run(runs, 0.2, 0.2, seed)
    for part, share in ((split.train, 0.6), (split.validation, 0.2), (split.test, 0.2)):
        count = Counter(runs[index].family for index in part)
        assert all(abs(count[name] - share * size) <= 1 for name, size in (("a", 10), ("b", 5), ("c", 20))), count


@pytest.mark.parametrize("seed", range(5))
def test_small_families_do_not_all_round_to_nothing(seed):
    split = split_by_run(made_runs(**dict.fromkeys("abcdefghi", 2)), 0.2, 0.2, seed)
    assert len(split.test) == len(split.validation) == 4


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_runs():
    runs = made_runs(a=6, b=6)
    shuffled = random.Random(1).sample(runs, len(runs))
    test_ids = [{some[index].run_id for index in split_by_run(some, 0.2, 0.2, 0).test} for some in (runs, shuffled)]
    assert test_ids[0] == test_ids[1]
    assert len({split_by_run(runs, 0.2, 0.2, seed).test for seed in range(8)}) > 1


def test_three_runs_are_the_fewest():
    split = split_by_run(made_runs(a=3), 0.2, 0.2, 0)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [1, 1, 1]
    with pytest.raises(UsageError, match=r"2 run\(s\): .* gather more"):
        split_by_run(made_runs(a=2), 0.2, 0.2, 0)


@pytest.mark.parametrize(
    ("validation", "test"), [(0, 0.2), (0.2, 0), (0.5, 0.5), (-1, 0.2), (math.nan, 0.2), (0.2, math.nan)]
)
def test_shares_that_cannot_be_are_refused(validation, test):
    with pytest.raises(UsageError, match="shares above 0"):
        split_by_run(made_runs(a=9), validation, test, 0)


def test_folds_hold_every_family_once_and_a_single_family_is_refused():
    runs = made_runs(a=1, b=2, c=1, d=3, e=1)
    folds = family_folds(runs, most=2, seed=0)
    assert sorted(len(fold) for fold in folds) == [2, 3]
    assert sorted(name for fold in folds for name in fold) == list("abcde")
    assert len(family_folds(runs, most=99, seed=0)) == 5
    assert runs_of(runs, ["b", "e"]) == (1, 2, 7)
    with pytest.raises(UsageError, match="at least two"):
        family_folds(made_runs(a=4), most=2, seed=0)


@pytest.mark.parametrize(
    ("family", "source", "held"),
    [
        ("mlp", "digits", False),
        ("resnet", "digits", True),
        ("resnets", "digits", False),
        ("mlp", "fashion", True),
        ("mlp", "fashion-first", True),
        ("mlp", "fashion@14", True),
        ("mlp", "fashion:size=14", True),
        ("mlp", "fashionable", False),
        ("mlp", "old-fashion", False),
    ],
)
def test_a_run_is_held_out_by_its_family_or_by_what_its_source_is_made_of(family, source, held):
    assert HeldOut(("resnet", "vit"), ("foods", "fashion")).holds(family, source) == held
    assert not HeldOut().holds(family, source)


def test_a_split_file_names_families_or_sources_or_both(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('# mine\nsources = ["digits"]\n')
    assert read_held_out(path) == HeldOut((), ("digits",))
    path.write_text('families = ["a", "b"]\nsources = ["c"]\n')
    assert read_held_out(path) == HeldOut(("a", "b"), ("c",))
    assert read_held_out(path).among(["b", "d"], ["c@x", "e"]) == ["b", "c@x"]

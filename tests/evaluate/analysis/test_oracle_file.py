"""How much of an oracle's saving a policy reaches, by hand, and which oracles a report takes."""

import json
from pathlib import Path

import pytest

from evaluate.analysis.oracle_file import (
    best_multiplier,
    find_oracles,
    oracles_beside,
    read_oracle,
    shares_of_saving,
)
from evaluate.analysis.statistics import compare
from evaluate.report.format import oracle_finding
from evaluate.trials.records import read_results


@pytest.fixture
def shares(write, trial, oracle, tmp_path):
    """Shares of the saving of {workload: {label: (accuracy difference, FLOPs of 1000)}} with an oracle of each."""

    def make(**workloads):
        rows = [
            trial(name, label, seed, accuracy=0.9 + difference, flops=flops)
            for name, cells in workloads.items()
            for label, (difference, flops) in {"none": (0.0, 1000), **cells}.items()
            for seed in range(2)
        ]
        known = {name: read_oracle(oracle(tmp_path / "oracle", name)) for name in workloads}
        results = read_results(write(rows))
        return shares_of_saving(results, compare(results), known)

    return make


def test_an_oracle_saves_what_its_cheapest_good_schedule_saves(oracle, tmp_path):
    found = read_oracle(oracle(tmp_path, "a"))  # 40 % of the FLOPs for 1 point, 70 % for none
    savings = [found.saving(difference) for difference in (-0.5, -0.01, 0.9 - 0.91, -0.009, 0.0, 0.001)]
    assert savings == pytest.approx([0.6, 0.6, 0.6, 0.3, 0.3, 0.0])


CACHED = {"flops_share": 0.3, "difference": -0.004, "accuracy": 0.9, "fronts": [[0.0, 0.6]], "cache": True}
SAFE = {"flops_share": 0.7, "difference": 0.0, "accuracy": 0.91, "fronts": [[0.5, 0.5]]}


def test_a_policy_without_a_cache_is_held_against_schedules_without_one(write, trial, oracle, tmp_path, told):
    """The cached schedule saves 70 %, the best without a cache 30 %; both policies save 15 %."""
    known = {"a": read_oracle(oracle(tmp_path / "oracle", "a", front=[CACHED, SAFE], uncached=[SAFE]))}
    flops = {"none": 1000, "fast": 850, "fast, cached": 850}
    rows = [trial("a", label, seed, accuracy=0.9, flops=own) for label, own in flops.items() for seed in (0, 1)]
    results = read_results(write(rows))
    found = shares_of_saving(results, compare(results), known)
    assert found["a", "fast"] == pytest.approx(0.15 / 0.3)
    assert found["a", "fast, cached"] == pytest.approx(0.15 / 0.7)


def test_the_best_is_at_the_searchs_edge_where_nothing_cheaper_was_tried(oracle, tmp_path):
    found = read_oracle(oracle(tmp_path, "a", front=[CACHED, SAFE], uncached=[SAFE]))
    best, plain = found.best_within(-0.005), found.best_within(-0.005, cached=False)
    assert best == found.front[0]
    assert plain == found.front[1]
    assert found.at_edge(best)
    assert found.at_edge(plain, cached=False)
    assert not found.at_edge(found.best_within(0.0))
    assert found.best_within(0.01) is None
    assert "ended at its edge" in oracle_finding(found, 0.005)
    assert "ended at its edge" not in oracle_finding(read_oracle(oracle(tmp_path, "b")), 0.005)


def test_the_best_multiplier_is_read_off_the_results_own_curve(write, trial, oracle, tmp_path):
    """Full training has .90 for 1000 FLOPs and .88 for 600. The cached schedule loses .4 of these 2 points, so full
    training takes 92 % of the FLOPs for it, over 30 %: 3.07. The safe one has 1 / 0.7."""
    lengths = {"none": (0.9, 1000), "shorter 0.6": (0.88, 600)}
    rows = [trial("a", label, seed, accuracy=a, flops=f) for label, (a, f) in lengths.items() for seed in (0, 1)]
    results = read_results(write(rows))
    found = best_multiplier(read_oracle(oracle(tmp_path, "a", front=[CACHED, SAFE])), results, "a")
    assert found is not None
    assert found.value == pytest.approx(0.92 / 0.3)
    assert found.schedule.cache
    # Below the shortest length a multiplier would be a bound from above, however large.
    poor = CACHED | {"flops_share": 0.01, "difference": -0.5}
    found = best_multiplier(read_oracle(oracle(tmp_path, "a", front=[poor, SAFE])), results, "a")
    assert found is not None
    assert found.value == pytest.approx(1 / 0.7)
    assert best_multiplier(read_oracle(oracle(tmp_path, "a", front=[poor])), results, "a") is None


@pytest.mark.parametrize(
    ("difference", "flops", "expected"),
    [
        (0.0, 850, 0.15 / 0.3),
        (-0.004, 850, 0.15 / 0.3),  # within the margin: held against what is within the margin
        (0.03, 700, 1.0),  # no schedule is as accurate: held against those within the margin too
        (-0.02, 700, 0.3 / 0.6),  # held against what loses 1 point
        (0.0, 1300, -1.0),
        (0.0, 400, 2.0),
    ],
)
def test_the_share_of_one_workload(shares, difference, flops, expected):
    found = shares(a={"fast": (difference, flops)})
    assert found["a", "fast"] == pytest.approx(expected)
    assert found[None, "fast"] == pytest.approx(expected)
    assert ("a", "none") not in found


def test_over_workloads_savings_are_added_up(shares):
    found = shares(a={"fast": (0.0, 850), "half": (0.0, 850)}, b={"fast": (-0.02, 520)})
    assert found["b", "fast"] == pytest.approx(0.48 / 0.6)
    assert found[None, "fast"] == pytest.approx((0.15 + 0.48) / (0.3 + 0.6))
    assert (None, "half") not in found  # it was not run on b
    assert found["a", "half"] == pytest.approx(0.5)


def test_where_the_oracle_saves_nothing_there_is_no_share(write, trial, oracle, tmp_path):
    full = {"flops_share": 1.0, "difference": 0.0, "accuracy": 0.9, "fronts": []}
    known = {"a": read_oracle(oracle(tmp_path, "a", front=[full]))}
    results = read_results(write([trial("a", name, 0) for name in ("none", "fast")]))
    assert shares_of_saving(results, compare(results), known) == {}


def test_oracles_are_taken_from_beside_the_suite_where_they_fit(folder, oracle):
    place = oracles_beside(folder)
    assert place == folder.parent / "oracle"
    results = read_results(folder)
    assert find_oracles(place, results) == ({}, [])
    oracle(place, "digits-mlp")
    oracle(place, "fashion-resnet8", source="digits")
    oracle(place, "another-workload")
    (place / "glosses-transformer.json").write_text("{")
    found, refused = find_oracles(place, results)
    assert list(found) == ["digits-mlp"]
    assert len(refused) == 2
    assert "fashion-resnet8.json: the oracle of another recipe or source" in refused[0]
    assert "glosses-transformer.json: not an oracle" in refused[1]
    content = json.loads((place / "digits-mlp.json").read_text())
    oracle(place, "digits-mlp", recipe=content["recipe"] | {"lr": 0.2})
    assert find_oracles(place, results)[0] == {}


def test_a_workload_whose_name_is_no_file_name_has_no_oracle(write, trial, oracle, tmp_path):
    oracle(tmp_path / "oracle", "a")
    names = ("../oracle/a", "\0", "x" * 400, "a.json")
    results = read_results(write([trial(name, "none", 0) for name in names]))
    assert find_oracles(tmp_path / "oracle", results) == ({}, [])


@pytest.fixture
def refusal(write, trial, oracle, tmp_path):
    """Why an oracle of the workload "a" with these changes is not used beside a baseline's trial with those."""

    def make(changes, kept=(), **config):
        row = trial("a", "none", 0)
        row["config"] |= config
        results = read_results(write([row, trial("a", "fast", 0)], **changes))
        oracle(tmp_path / "oracle", "a", **dict(kept))
        found, refused = find_oracles(tmp_path / "oracle", results)
        assert bool(found) is not bool(refused)
        return "".join(refused)

    return make


def test_an_oracle_is_held_against_full_training_alone(refusal, told):
    assert refusal({}) == ""
    for entry in (
        told("none", sieve=0.2),
        told("none", cache=True),
        told("shorter 0.7"),
        told("none", options={"a": 1}),
        7,
    ):
        assert "held against full training, and the baseline none is another" in refusal({}, policy=entry)
    assert "the baseline fast is another" in refusal({"baseline": "fast"})


def test_without_a_training_of_the_baseline_there_is_nothing_to_hold_it_against(refusal):
    assert "no training under full to hold an oracle against" in refusal({"baseline": "full"})


def test_an_oracle_is_of_the_same_network(refusal):
    other = "the oracle of another network, or of other code of it"
    assert other in refusal({}, workload="b")  # of before, when files did not name it: what is called a is b here
    assert refusal({}, {"name": "mine:a"}, workload="mine:a") == ""
    assert other in refusal({}, {"name": "mine:a"}, workload="mine:b")
    code = {"name": "mine:a", "code": "12ab"}
    assert refusal({}, code, workload="mine:a", code={"workload": "12ab", "policy": "77"}) == ""
    assert other in refusal({}, code, workload="mine:a", code={"workload": "34cd"})
    assert other in refusal({}, code, workload="mine:a")
    assert other in refusal({}, {"name": "mine:a"}, workload="mine:a", code={"workload": "12ab"})


PUBLISHED = Path(__file__).parents[3] / "evaluate" / "results" / "oracle"


def test_the_oracles_that_the_repository_publishes_are_read_and_fit(write, trial):
    rows = []
    for path in sorted(PUBLISHED.glob("*.json")):
        known = read_oracle(path)
        row = trial(known.workload, "none", 0)
        rows.append(row | {"config": row["config"] | {"recipe": known.recipe, "source": known.source}})
    found, refused = find_oracles(PUBLISHED, read_results(write(rows)))
    assert (len(found), refused) == (len(rows), [])
    assert rows

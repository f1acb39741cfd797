"""The search for the best freezing schedule: real trainings, and the schedules that it may propose."""

import json

import optuna
import pytest

from collect.workloads import own_code
from evaluate.__main__ import main
from evaluate.analysis.oracle import Proposal, find_oracle, growing, make_search, proposal, written
from evaluate.analysis.oracle_file import find_oracles, read_oracle
from evaluate.trials.plan import Settings
from evaluate.trials.records import read_results
from evaluate.trials.suite import SUITES
from evaluate.trials.trial import run_trial
from predictor.errors import UsageError

SIX = "tests.evaluate.toys:six_linear"


def lines(out):
    return (out / SIX / "results.jsonl").read_text().splitlines()


def test_a_prefix_is_there_from_the_start_and_grows_by_tenths():
    assert growing(4, 7, 0.5, 0.2, 1.0) == ((0.0, 0.4), (0.5, 0.5), (0.6, 0.6), (0.7, 0.7))
    assert growing(0, 3, 0.2, 0.4, 1.0) == ((0.2, 0.1), (0.4, 0.2), (0.6, 0.3))
    assert growing(6, 6, 0.2, 0.4, 1.0) == growing(6, 0, 0.9, 0.0, 2.0) == ((0.0, 0.6),)
    assert growing(0, 10, 0.0, 0.0, 1.0) == growing(10, 10, 0.5, 0.5, 1.0) == ((0.0, 1.0),)
    assert growing(0, 3, 0.8, 0.4, 1.0) == ((0.8, 0.1),)  # what would freeze at the end or later does not
    assert growing(0, 10, 1.0, 0.5, 1.0) == growing(0, 0, 0.0, 1.0, 1.0) == ()
    assert growing(0, 3, 0.0, 0.8, 2.0) == ((0.0, 0.1), (0.2, 0.2), (0.8, 0.3))


FROM_HALF = {"start": 2, "last": 10, "begin": 0.5, "over": 0.0, "bend": 1.0}


@pytest.mark.parametrize(
    ("changes", "keepable", "expected"),
    [
        ({"cache": True, "stop": True}, True, Proposal(((0.0, 0.2), (0.5, 1.0)), cache=True, stop=True)),
        ({"cache": True, "stop": True}, False, Proposal(((0.0, 0.2), (0.5, 1.0)), stop=True)),
        # Not all layers freeze, so there is nothing to stop; or all do before the first step, when nothing was learned.
        ({"last": 5, "cache": False, "stop": True}, True, Proposal(((0.0, 0.2), (0.5, 0.5)))),
        ({"start": 10, "cache": True, "stop": True}, True, Proposal(((0.0, 1.0),), cache=True)),
        ({"start": 0, "last": 0, "cache": True, "stop": True}, True, Proposal(())),
    ],
)
def test_a_proposal_has_nothing_that_makes_no_difference(changes, keepable, expected):
    assert proposal(optuna.trial.FixedTrial(FROM_HALF | changes), keepable) == expected


def in_this_process(jobs, *, folder, on_done, **options):
    """Stands in for run_jobs: starts no process for the trials."""
    for job in jobs:
        on_done(job, run_trial(job.payload, folder, lambda share: None))


def test_a_search_ends_with_a_front_and_the_same_search_trains_nothing_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.trials.run.run_jobs", in_this_process)
    out = tmp_path / "oracle"
    command = ["oracle", SIX, "--seeds", "0", "--trials", "4", "--slots", "1", "--device", "cpu", "--out", str(out)]
    assert main(command) is None
    said = capsys.readouterr().out
    assert "4 of 4 schedules tried" in said
    assert "FLOPs within 0.5 pp" in said
    oracle, first = read_oracle(out / f"{SIX}.json"), lines(out)
    assert (oracle.workload, oracle.seeds, oracle.recipe["epochs"]) == (SIX, (0,), 2)
    shares = [each.flops_share for each in oracle.front]
    differences = [each.difference for each in oracle.front]
    assert shares == sorted(shares)
    assert differences == sorted(differences)
    # From a prefix that grows to one of 40 % from the start with all frozen at half of the training, and the cache.
    assert 0.3 < shares[0] < 0.7
    assert shares[-1] <= 1.0
    assert any(each.cache for each in oracle.front)
    assert oracle.uncached
    assert not any(each.cache for each in oracle.uncached)
    assert differences[-1] >= 0.0
    # The front is of the trials that were run.
    rows = {row["policy"]: row for row in map(json.loads, first)}
    cheapest = oracle.front[0]
    wanted = ({"fronts": [list(f) for f in cheapest.fronts]}, cheapest.cache, cheapest.stop)
    entries = {label: row["config"]["policy"] for label, row in rows.items()}
    kind = {label: (e["options"], e.get("cache", False), e.get("stop", False)) for label, e in entries.items()}
    same = [row for label, row in rows.items() if kind[label] == wanted]
    assert [row["accuracy"] for row in same] == [cheapest.accuracy]
    assert same[0]["flops"] / rows["none"]["flops"] == cheapest.flops_share
    # It is told by the network's own code, so that it is not used beside trainings of changed code.
    assert (oracle.name, oracle.code) == (SIX, own_code(SIX))
    assert find_oracles(out, read_results(out / SIX)) == ({SIX: oracle}, [])
    main(command)
    assert lines(out) == first
    assert read_oracle(out / f"{SIX}.json") == oracle


def test_a_suite_says_what_is_trained():
    search = make_search("resnet20-transfer", str(SUITES / "quick.toml"), None, 4)
    assert (search.seeds, search.scores, search.workload.recipe["train_samples"]) == ((0, 1, 2, 3, 4), "end", 1000)
    assert make_search("resnet8-fashion", None, [4], 4).seeds == (4,)
    own = make_search("mobilenet-transfer", "pretrained", [4], 4)  # which has seeds of its own there
    assert (own.seeds, own.workload.seeds) == ((4,), None)
    assert len(make_search("mobilenet-transfer", "pretrained", None, 4).seeds) == 32
    with pytest.raises(UsageError, match="has no workload 'vit': it has mlp-fashion"):
        make_search("vit", "quick", None, 4)


def test_what_cannot_be_searched_is_refused_before_any_training(tmp_path):
    with pytest.raises(UsageError, match="trials=0"):
        make_search(SIX, None, None, 0)
    for seeds, message in (
        ([1, 1], r"seeds: \[1, 1\]: give each once"),
        ([], "at least one"),
        ([-1], r"seeds: \[0\]: -1"),
    ):
        with pytest.raises(UsageError, match=message):
            make_search(SIX, None, seeds, 2)
    with pytest.raises(UsageError, match=rf"seeds: \[1\]: {2**64}: .*less than"):
        make_search(SIX, None, [0, 2**64], 2)
    with pytest.raises(UsageError, match="workload"):
        find_oracle(make_search("no-such-workload", None, None, 2), tmp_path, Settings("cpu"))


def test_a_front_is_written_with_its_times(tmp_path):
    path = tmp_path / "a.json"
    front = [
        {"flops_share": 0.61, "difference": -0.01, "accuracy": 0.8, "fronts": [[0.2, 0.5], [0.5, 1.0]]},
        {"flops_share": 1.0, "difference": 0.0, "accuracy": 0.81, "fronts": []},
    ]
    facts = {"workload": "a", "recipe": {}, "source": "digits", "seeds": [0], "tried": 2}
    path.write_text(json.dumps(facts | {"front": front}))
    assert [line.split() for line in written(read_oracle(path).front).splitlines()[1:]] == [
        ["61%", "80.00", "-1.00", *["50%", "from", "20%", "on,", "100%", "from", "50%", "on"]],
        ["100%", "81.00", "+0.00", "nothing", "freezes"],
    ]

"""Reading a suite's folder: what is kept, what is left out and named, what is refused."""

import json

import pytest

from evaluate.trials.records import ACCOUNTING, has_result, read_results
from predictor.errors import FileFault


def test_everything_that_was_written_is_read(folder, rows):
    results = read_results(folder)
    assert len(results.trials) == 45
    assert results.faults == ()
    assert results.missing() == []
    trial, row = results.trials[4], rows[4]
    assert (trial.workload, trial.policy, trial.seed) == (row["workload"], "smartfrz", 0)
    assert trial.accuracy == row["accuracy"]
    assert trial.curve[-1].test_loss == row["curve"][-1]["test_loss"]
    assert trial.freezes[-1].frozen == set(row["freezes"][-1]["frozen"])
    assert trial.step_cost[0].seconds == row["step_cost"][0]["seconds"]
    assert trial.cost("cpu_seconds") == row["cpu_seconds"]
    assert trial.cost("train_seconds") == row["train_seconds"]


def test_a_loss_that_is_no_number_is_none(folder):
    lost = next(trial for trial in read_results(folder).trials if trial.status == "diverged")
    assert lost.curve[-1].test_loss is None
    assert lost.accuracy is None


def test_of_two_lines_for_one_trial_the_last_counts(write, trial):
    failed = trial("digits-mlp", "none", 0, status="failed", accuracy=None)
    results = read_results(write([failed, trial("digits-mlp", "none", 0)]))
    assert [trial.status for trial in results.trials] == ["finished"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"trial_id": "cut', "line 2: cut short"),
        ("\x00\x00\x00", "line 2: cut short, or not JSON"),
        ("[1, 2]", "line 2: not an object"),
        ({"seed": "zero"}, "line 2: seed: 'zero'"),
        ({"seed": True}, "line 2: seed: True"),
        ({"policy": None}, "line 2: policy: missing"),
        ({"accuracy": "high"}, "line 2: accuracy: 'high'"),
        ({"status": "perhaps"}, "line 2: status: 'perhaps'"),
        ({"accuracy": 1.01}, "line 2: accuracy: 1.01"),
        ({"accuracy": -0.1}, "line 2: accuracy: -0.1"),
        ({"curve": [{"step": 1, "test_accuracy": 93.0}]}, "line 2: curve[0].test_accuracy: 93.0"),
        ({"flops": -1}, "line 2: flops: -1"),
        ({"flops": 1e308}, "line 2: flops: 1e+308"),
        ({"cpu_seconds": -0.5}, "line 2: cpu_seconds: -0.5"),
        ({"steps": 2**53 + 1}, "line 2: steps: 9007199254740993"),
        ({"planned_steps": -1}, "line 2: planned_steps: -1"),
        ({"slots": 10**30}, "line 2: slots: 1000000000000000000000000000000"),
        ({"slots": None}, "line 2: slots: None"),
        ({"accuracy": None}, "line 2: finished without an accuracy"),
        ({"accuracy": float("nan")}, "line 2: finished without an accuracy"),
        ({"flops": 10**400}, "line 2: "),
        ({"freezes": [{"step": 1}]}, "line 2: "),
        ({"curve": 7}, "line 2: "),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_broken_line_costs_itself_alone_and_is_named(write, trial, line, fault):
    path = write([trial("digits-mlp", "none", seed) for seed in range(3)])
    broken = json.dumps(trial("digits-mlp", "none", 1) | line) if isinstance(line, dict) else line
    lines = (path / "results.jsonl").read_text().splitlines()
    (path / "results.jsonl").write_text("\n".join([lines[0], broken, lines[2], ""]))
    results = read_results(path)
    assert [trial.seed for trial in results.trials] == [0, 2]
    assert len(results.faults) == 1
    assert fault in results.faults[0]


def test_planned_trials_that_were_not_run_are_missing(write, trial):
    path = write([trial("digits-mlp", "none", 0)], policies=["none", "smartfrz"], seeds=[0, 1])
    results = read_results(path)
    assert results.missing() == [
        ("digits-mlp", "none", 1),
        ("digits-mlp", "smartfrz", 0),
        ("digits-mlp", "smartfrz", 1),
    ]
    assert results.policies == ("none", "smartfrz")
    assert results.planned("digits-mlp", "smartfrz") == 2


def test_where_workloads_and_policies_have_their_own_seeds_those_alone_are_planned(write, trial):
    own = {"workload_seeds": {"digits-mlp": [0, 1, 2]}, "policy_seeds": {"smartfrz": [0, 2]}}
    cells = {"workloads": ["digits-mlp", "digits-vgg"], "policies": ["none", "smartfrz"], "seeds": [0]}
    rows = [trial("digits-mlp", "none", 0), trial("digits-mlp", "none", 1), trial("digits-vgg", "none", 0)]
    results = read_results(write(rows, **cells, **own))
    assert results.missing() == [
        ("digits-mlp", "none", 2),
        ("digits-mlp", "smartfrz", 0),
        ("digits-mlp", "smartfrz", 2),
        ("digits-vgg", "smartfrz", 0),
    ]
    assert results.planned("digits-mlp", "smartfrz") == 2
    assert results.seed_count == "1 to 2"


def test_trials_beyond_the_plan_are_kept(write, trial):
    path = write([trial("digits-mlp", name, 5) for name in ("none", "extra")], policies=["none"], seeds=[0])
    results = read_results(path)
    assert results.policies == ("none", "extra")
    assert results.planned("digits-mlp", "extra") == 1
    assert results.planned("digits-mlp", "none") == 2


@pytest.mark.parametrize("name", ["suite.json", "results.jsonl"])
def test_a_missing_file_is_named_with_the_cure(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileFault, match=rf"^{folder / name}: cannot be read .*run-suite"):
        read_results(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"name": 3}', '{"name": "a", "baseline": "none", "margin": null}', "[" * 100_000]
)
def test_a_broken_description_is_refused(folder, content):
    (folder / "suite.json").write_text(content)
    with pytest.raises(FileFault, match=r"suite\.json: not"):
        read_results(folder)


def test_an_unknown_cost_axis_is_refused(write, rows):
    with pytest.raises(FileFault, match="cost: 'euros'"):
        read_results(write(rows, cost="euros"))


def test_the_share_of_batches_that_hit_the_cache(write, trial):
    cache = {"hits": 30, "misses": 10, "bytes": 1, "cut": "a", "reason": ""}
    caches = [None, cache, {**cache, "hits": 0, "misses": 0}, {**cache, "hits": "many"}]
    rows = [trial("a", "none", seed, cache=cache) for seed, cache in enumerate(caches)]
    results = read_results(write(rows))
    assert [trial.hit_share for trial in results.trials] == [None, 0.75, 0.0]
    assert len(results.faults) == 1
    assert "line 4: cache.hits: 'many'" in results.faults[0]


def test_how_many_ran_at_a_time_and_where_is_kept(write, trial):
    known = trial("a", "none", 0, slots=3, adopted=True)
    unknown = {key: value for key, value in trial("a", "none", 1).items() if key != "slots"}
    assert [(row.slots, row.adopted) for row in read_results(write([known, unknown])).trials] == [(3, True), (1, False)]


def test_a_line_without_how_many_ran_at_a_time_is_no_result(trial):
    row = trial("a", "none", 0, accounting=ACCOUNTING)
    assert has_result(row)
    assert not has_result({key: value for key, value in row.items() if key != "slots"})


CHANGES = [{"trial_id": ["a"]}, {"trial_id": None}, {"trial_id": ""}, {"slots": None}, {"slots": "2"}, {"slots": True}]
NONSENSE = [{"steps": -1}, {"workload": ""}, {"policy": ""}, {"accuracy": None}, {"flops": "many"}, {"curve": [{}]}]


@pytest.mark.parametrize("change", CHANGES + NONSENSE)
def test_a_line_that_the_report_leaves_out_is_no_result(write, trial, change):
    row = trial("a", "none", 0, accounting=ACCOUNTING) | change
    assert not has_result(row)
    assert len(read_results(write([trial("a", "none", 1), row], policies=["none"], workloads=["a"])).faults) == 1

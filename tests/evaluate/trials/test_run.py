"""Running a plan: what is kept, skipped, tried again and set aside. The trials themselves are made up."""

import dataclasses
import fcntl
import json

import pytest
import torch

from collect.jobs import JobOptions
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.plan import Settings, make_plan
from evaluate.trials.records import ACCOUNTING, read_results
from evaluate.trials.run import pending, run_suite
from evaluate.trials.suite import PolicyEntry, WorkloadEntry
from predictor.errors import FileFault, UsageError
from predictor.shared.files import read_json_lines
from tests.evaluate.machine import SUITE, Machine


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def run(tmp_path):
    def run(suite=SUITE, slots=1, predictor=None, log=lambda figures, step: None):
        folder = SuiteFolder(tmp_path / "out")
        plan = make_plan(suite, Settings("cpu", slots, predictor))
        return run_suite(plan, folder, log), folder, plan

    return run


TITLES = [f"mlp-digits, {policy}, seed {seed}" for seed in (0, 1) for policy in ("none", "linear")]


def test_every_trial_runs_once(machine, run):
    logged = []
    summary, folder, plan = run(log=lambda figures, step: logged.append((step, figures["policy"])))
    assert machine.ran == TITLES
    assert (summary.done, summary.failed) == (4, {})
    assert logged == [(1, "none"), (2, "linear"), (3, "none"), (4, "linear")]
    again, _, _ = run()
    assert machine.ran == TITLES
    assert again.done == 4
    assert pending(plan, folder) == []


def test_what_was_broken_off_goes_on(machine, run):
    machine.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        run()
    machine.dies_after = None
    summary, folder, _ = run()
    assert machine.ran == TITLES
    assert summary.done == 4
    assert len(read_results(folder.root).trials) == 4


def test_a_line_that_a_kill_cut_short_is_run_again(machine, run):
    _, folder, _ = run()
    content = folder.results.read_bytes()
    folder.results.write_bytes(content[:-20])
    run()
    assert machine.ran == [*TITLES, TITLES[-1]]
    results = read_results(folder.root)
    assert len(results.trials) == 4
    assert results.faults == ()


def test_a_failed_trial_is_told_and_tried_again(machine, run):
    machine.fails = {TITLES[1]}
    summary, folder, plan = run()
    log = folder.log(plan.jobs[1].id)
    assert summary.failed == {TITLES[1]: f"it broke; its log: {log}"}
    assert summary.done == 3
    assert {trial.status for trial in read_results(folder.root).trials} == {"finished", "failed"}
    machine.fails = set()
    machine.ran.clear()
    summary, _, _ = run()
    assert machine.ran == [TITLES[1]]
    assert (summary.done, summary.failed) == (4, {})
    assert {trial.status for trial in read_results(folder.root).trials} == {"finished"}


def test_results_of_another_predictor_are_set_aside_and_come_back(machine, run, make_predictor_file):
    suite = dataclasses.replace(SUITE, policies=(PolicyEntry("none", "none"), PolicyEntry("smartfrz", "smartfrz")))
    first, second = make_predictor_file(0.9), make_predictor_file(0.8)
    _, folder, plan = run(suite, predictor=first)
    run(suite, predictor=second)
    assert len(machine.ran) == 6  # none is not trained again
    assert len(read_json_lines(folder.earlier)) == 2
    run(suite, predictor=first)
    assert len(machine.ran) == 6
    assert {row["trial_id"] for row in read_json_lines(folder.results)} == {job.id for job in plan.jobs}
    assert len({row["trial_id"] for row in read_json_lines(folder.earlier)}) == 4  # nothing was lost


def test_the_suite_keeps_its_predictor(machine, run, make_predictor_file):
    suite = dataclasses.replace(SUITE, policies=(PolicyEntry("none", "none"), PolicyEntry("smartfrz", "smartfrz")))
    path = make_predictor_file()
    _, folder, plan = run(suite, predictor=path)
    (mark,) = plan.predictors
    assert folder.predictor(mark).read_bytes() == path.read_bytes()
    assert plan.trials[1].policy.options == {"predictor": f"sha256:{mark}"}
    copy = str(folder.predictor(mark).relative_to(folder.root))
    assert [job.files for job in plan.jobs[:2]] == [(), (copy,)]  # what a node needs of the folder


def test_wall_clock_is_the_cost_where_trials_ran_one_at_a_time(machine, run):
    def cost(folder):
        return json.loads(folder.suite.read_text())["cost"]

    assert cost(run(slots=1)[1]) == "train_seconds"
    assert cost(run(slots=2)[1]) == "train_seconds"  # nothing was left to run
    more = dataclasses.replace(SUITE, seeds=(0, 1, 2))
    assert cost(run(more, slots=2)[1]) == "cpu_seconds"
    assert cost(run(more, slots=1)[1]) == "cpu_seconds"  # two of its trials shared the machine


def test_flops_are_the_cost_where_trials_share_a_gpu(machine, run, monkeypatch):
    monkeypatch.setattr("evaluate.trials.plan.pick_device", lambda name: torch.device("cuda"))
    _, folder, _ = run(slots=2)
    assert read_results(folder.root).suite.cost == "flops"


def test_flops_are_the_cost_of_a_cluster_whose_machines_differ(machine, tmp_path):
    settings = Settings("cpu", jobs=JobOptions("ray"))
    plan, folder = make_plan(SUITE, settings), SuiteFolder(tmp_path)
    run_suite(plan, folder, lambda figures, done: None)
    assert read_results(folder.root).suite.cost == "flops"
    alone = make_plan(SUITE, Settings("cpu", 2))
    assert [trial.id for trial in plan.trials] == [trial.id for trial in alone.trials]


def test_what_was_counted_otherwise_is_set_aside_before_it_is_run_again(machine, run):
    _, folder, _ = run()
    text = folder.results.read_text()
    folder.results.write_text(text.replace(f'"accounting": {ACCOUNTING}', '"accounting": 1'))
    machine.dies_after = 2
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(read_results(folder.root).trials) == 2
    assert len(folder.earlier.read_text().splitlines()) == 4


def test_the_description_is_what_the_report_reads(machine, run):
    suite = read_results(run()[1].root).suite
    assert (suite.name, suite.baseline, suite.margin) == ("mine", "none", 0.005)
    assert (suite.workloads, suite.policies, suite.seeds) == (("mlp-digits",), ("none", "linear"), (0, 1))


def test_seeds_of_workloads_and_policies_are_what_is_trained_and_what_the_report_expects(machine, run):
    workloads = (WorkloadEntry("mlp-digits", "mlp-digits", seeds=(0, 1, 2)),)
    policies = (PolicyEntry("none", "none"), PolicyEntry("linear", "linear", seeds=(2,)))
    results = read_results(run(dataclasses.replace(SUITE, workloads=workloads, policies=policies))[1].root)
    trained = {*(f"mlp-digits, none, seed {seed}" for seed in range(3)), "mlp-digits, linear, seed 2"}
    assert (set(machine.ran), len(machine.ran)) == (trained, 4)
    assert results.missing() == []
    assert (results.planned("mlp-digits", "none"), results.planned("mlp-digits", "linear")) == (3, 1)


def test_two_at_once_in_one_folder(machine, run, tmp_path):
    run()
    with (tmp_path / "out" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run-suite is at work"):
            run()
    run()


def test_a_folder_that_cannot_be_written_to(machine, run, tmp_path):
    (tmp_path / "out").write_text("a file stands here")
    with pytest.raises(FileFault, match="choose another place with --out"):
        run()
    assert machine.ran == []


def test_lines_of_nonsense_are_no_results(machine, run):
    _, folder, plan = run()
    rows = read_json_lines(folder.results)
    broken = {key: value for key, value in rows[0].items() if key != "slots"}
    nonsense = [broken, rows[1] | {"trial_id": ["a"]}, rows[1] | {"steps": -1}, {"status": "failed", "trial_id": {}}]
    deep = ["[" * 100_000, '{"trial_id": ' + "9" * 5_000 + "}"]
    folder.results.write_text("\n".join([*map(json.dumps, [*nonsense, *rows[2:]]), *deep, ""]))
    assert [job.title for job in pending(plan, folder)] == TITLES[:2]
    run()
    assert machine.ran == [*TITLES, *TITLES[:2]]
    assert len(read_results(folder.root).trials) == 4
    assert read_results(folder.root).faults == ()
    run()
    assert len(machine.ran) == 6

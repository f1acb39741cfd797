"""Taking trials over that were run elsewhere: which are taken, and what a file that is none comes to."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from evaluate.trials.adopt import _is_one_of, adopt
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.plan import Settings, make_plan
from evaluate.trials.records import ADOPTED, has_result, read_results
from evaluate.trials.run import pending, run_suite
from evaluate.trials.suite import PolicyEntry, WorkloadEntry, read_suite
from predictor.errors import FileFault
from predictor.shared.files import read_json_lines
from tests.evaluate.machine import SUITE, Machine


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    return SuiteFolder(tmp_path / "here")


@pytest.fixture
def elsewhere(machine, tmp_path):
    """The results of SUITE, run in another folder."""
    other = SuiteFolder(tmp_path / "elsewhere")
    run_suite(_plan(SUITE, other), other, lambda figures, step: None)
    machine.ran.clear()
    return other.results


def _plan(suite, folder):
    return make_plan(suite, Settings("cpu", 1))


def test_what_was_run_elsewhere_is_not_run_again(machine, elsewhere, folder):
    more = dataclasses.replace(SUITE, policies=(*SUITE.policies, PolicyEntry("static", "static")))
    plan = _plan(more, folder)
    adopted = adopt(elsewhere, plan, folder)
    assert len(adopted) == 4
    assert [job.payload["policy"]["label"] for job in pending(plan, folder, adopted)] == ["static", "static"]
    assert not folder.root.exists()
    run_suite(plan, folder, lambda figures, step: None, adopted)
    assert machine.ran == [f"mlp-digits, static, seed {seed}" for seed in (0, 1)]
    results = read_results(folder.root)
    assert results.missing() == []
    assert results.suite.cost == "flops"  # seconds of two machines are not compared
    assert [bool(row.get(ADOPTED)) for row in read_json_lines(folder.results)].count(True) == 4
    assert adopt(elsewhere, plan, folder) == []


def test_ones_own_trials_stay(machine, elsewhere, folder):
    plan = _plan(SUITE, folder)
    run_suite(plan, folder, lambda figures, step: None)
    assert adopt(elsewhere, plan, folder) == []
    assert read_results(folder.root).suite.cost == "train_seconds"


def test_trials_of_another_configuration_and_failed_ones_are_left(machine, elsewhere, folder):
    rows = read_json_lines(elsewhere)
    rows[0]["status"] = "failed"
    elsewhere.write_text("".join(json.dumps(row) + "\n" for row in rows) + "half a li")
    longer = dataclasses.replace(SUITE, workloads=(WorkloadEntry("mlp-digits", "longer", recipe={"epochs": 30}),))
    assert adopt(elsewhere, _plan(longer, folder), folder) == []
    assert len(adopt(elsewhere, _plan(SUITE, folder), folder)) == 3


PUBLISHED = sorted((Path(__file__).parents[3] / "evaluate" / "results" / "trials").glob("*.jsonl.gz"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_what_the_repository_publishes_can_be_taken_over(path):
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert read_suite(path.name.partition(".")[0])
    assert all(has_result(row) for row in rows)
    assert all(_is_one_of(row, {row["trial_id"]}) for row in rows)
    assert len({row["trial_id"] for row in rows}) == len(rows) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"accounting": 1},
        {"config": {}},
        {"slots": None},
        {"accuracy": None},
        {"trial_id": ["a list"]},
        {"curve": [{"step": "nowhere"}]},
        {"workload": "vgg-digits"},
        {"policy": "static"},
        {"seed": 7},
        {"accuracy": 90.0},
    ],
)
def test_a_line_that_is_not_what_it_says_is_left(machine, elsewhere, folder, change):
    rows = read_json_lines(elsewhere)
    rows[0].update(change)
    elsewhere.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(adopt(elsewhere, _plan(SUITE, folder), folder)) == 3


def test_a_packed_file(machine, elsewhere, folder, tmp_path):
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(elsewhere.read_bytes()))
    assert len(adopt(packed, _plan(SUITE, folder), folder)) == 4


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.jsonl", None, "No such file"),
        ("plain.jsonl.gz", b"not packed", "Not a gzipped file"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:40], "cannot be read"),
        ("bomb.jsonl.gz", gzip.compress(bytes(1 << 24)), "this is no file of JSON lines"),
    ],
    ids=["no file", "not packed", "cut short", "no lines"],
)
def test_a_file_that_is_none(folder, tmp_path, name, content, why):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFault, match=why):
        adopt(path, _plan(SUITE, folder), folder)
    assert not folder.root.exists()

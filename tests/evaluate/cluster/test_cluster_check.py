"""The check of a cluster, without one: what counts as equal, what is killed, and who may run it."""

import json

import pytest

from evaluate.__main__ import main
from evaluate.cluster import command as module
from evaluate.cluster.compare import outcomes_differ, results_differ
from evaluate.cluster.kills import Killer, _is_job, _is_worker
from evaluate.cluster.timing import busy_share, sleep
from predictor.errors import UsageError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name="a", accuracy=0.5, seconds=1.0, **more):
    return {"trial_id": name, "accuracy": accuracy, "train_seconds": seconds, "curve": [{"train_seconds": 1}], **more}


def test_results_are_compared_without_times_and_order(tmp_path):
    one = write(tmp_path / "one", row(), row("b"))
    assert not results_differ(one, write(tmp_path / "same", row("b", seconds=9.0, slots=2), row()))
    failed = {"trial_id": "b", "status": "failed"}
    assert not results_differ(one, write(tmp_path / "again", failed, row(), row("b")))
    assert "accuracy" in results_differ(one, write(tmp_path / "other", row(accuracy=0.5 + 1e-12), row("b")))
    assert "twice" in results_differ(one, write(tmp_path / "twice", row(), row("b"), row()))
    assert "1" in results_differ(one, write(tmp_path / "fewer", row()))


def test_outcomes_are_compared_in_their_order(tmp_path):
    one = write(tmp_path / "one", {"loss": 1, "facts": {"versions": 1}}, {"loss": 2})
    assert not outcomes_differ(one, write(tmp_path / "same", {"loss": 1, "facts": {"versions": 2}}, {"loss": 2}))
    assert "[1, 2]" in outcomes_differ(one, write(tmp_path / "other", {"loss": 2}, {"loss": 1}))
    assert outcomes_differ(write(tmp_path / "none"), write(tmp_path / "none-too"))


class Nodes:
    """Stands in for a cluster, and notes what is killed."""

    def __init__(self):
        self.killed = []

    def kill(self, name):
        self.killed.append(name)

    def start(self, name):
        pass

    def processes(self, name, wanted):
        self.killed.append("a process")
        return []


class Driver:
    pid = 1 << 30  # nobody's


def test_kills_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr("evaluate.cluster.kills.os.killpg", lambda *_: None)
    found = []
    for seed in (0, 0, 1):
        nodes, killer = Nodes(), Killer(seed, 50)
        for _ in range(20):
            killer.strike(nodes, Driver())
        found.append((nodes.killed, killer.done, killer.left))
    assert found[0] == found[1] != found[2]
    assert "head" not in found[0][0]  # with it, all would be gone
    assert found[0][2] == 50 - sum(found[0][1].values())  # what was not there was not killed


def test_what_is_killed_is_ours():
    assert _is_job("python -m collect.jobs.worker ")
    assert _is_worker("ray::mlp-digits seed=0")
    assert not any(map(_is_worker, ("ray::IDLE", "ray::DashboardAgent", "python -m collect.jobs.worker")))


def test_the_share_of_slots_that_are_busy():
    spans = [(0, 10), (0, 10), (10, 20), (12, 22)]  # the second slot waits from 10 to 12
    assert busy_share(spans, 2) == pytest.approx((12 + 10) / (2 * 12))


def test_a_job_that_sleeps(tmp_path):
    shares = []
    span = sleep({"seconds": 0.01}, tmp_path, shares.append)
    assert span["end"] - span["start"] >= 0.01
    assert shares[0] <= 0.01


def test_it_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda: "needs root")
    for given, named in (((), "needs root"), (("--only", "gathre"), "gather"), (("--kills", "-1"), "kills=-1")):
        with pytest.raises(UsageError, match=named):
            main(["cluster-check", "--out", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()

"""The benchmark's tables and its file, on made-up and on real measurements."""

import json

import pytest

from evaluate import bench
from evaluate.fronts import FrontCost
from evaluate.overhead import Overhead
from evaluate.stopwatch import Spread
from predictor.errors import FileFault, UsageError

ONE = Spread(1.0, 0.98, 1.02)


def made_up(monkeypatch, share):
    row = Overhead("mlp-digits", "recorder", Spread(share, share / 2, share * 2), ONE)
    monkeypatch.setattr(bench, "WORKLOADS", {"mlp-digits": 2})
    monkeypatch.setattr(bench, "overheads", lambda *_: [row])
    monkeypatch.setattr(
        bench, "front_costs", lambda *_: [FrontCost("mlp-digits", 2, 4, Spread(0.5, 0.4, 0.6), ONE, 0.6)]
    )


def test_limits_that_hold(tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, 0.012)
    assert bench.run_bench(tmp_path / "new" / "bench.json", "cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    share = ["mlp-digits", "recorder", "1.20%", "[0.60%,", "2.40%]", "3.0%", "ok", "1.000", "[0.980,", "1.020]"]
    front = ["mlp-digits", "2/4", "0.500", "[0.400,", "0.600]", "1.00", "ok", "0.60", "1.000", "[0.980,", "1.020]"]
    assert share in lines
    assert front in lines
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["shares"][0]["share"] == {"median": 0.012, "low": 0.006, "high": 0.024}
    assert written["shares"][0]["holds"]
    assert written["fronts"][0]["flops"] == 0.6
    assert written["versions"]["torch"]


def test_a_limit_that_is_broken(tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, 0.031)
    assert not bench.run_bench(tmp_path / "bench.json", "cpu")
    assert "OVER" in capsys.readouterr().out
    assert not json.loads((tmp_path / "bench.json").read_text())["shares"][0]["holds"]


def test_the_real_thing_on_something_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WORKLOADS", {"mlp-digits": 2})
    monkeypatch.setattr(bench, "_FRONT_ROUNDS", 2)
    bench.run_bench(tmp_path / "bench.json", "cpu")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {row["hooks"] for row in written["shares"]} == set(bench.LIMITS)
    assert [row["frozen"] for row in written["fronts"]] == [1, 2, 3, 4]


def test_a_place_that_cannot_be_written_to_fails_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "overheads", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(FileFault, match="--out"):
        bench.run_bench(tmp_path / "file" / "bench.json", "cpu")


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="device='tpu'"):
        bench.run_bench(tmp_path / "bench.json", "tpu")

"""The benchmark's tables and its file, on made-up and on real measurements."""

import json

import pytest

from evaluate.bench import bench
from evaluate.bench.frozen_prefixes import PrefixCost
from evaluate.bench.memory import Change, PrefixMemory
from evaluate.bench.overhead import Overhead
from evaluate.trials.stopwatch import Spread
from predictor.errors import FileFault, UsageError

ONE = Spread(1.0, 0.98, 1.02)


def prefix(ratio):
    some = Spread(ratio - 1, 0, 0)
    return PrefixCost(
        "mlp-digits", 2, 4, Spread(ratio, 0.9, 1.1), ONE, some, some, ONE, ONE, 0.25, 0.5, 0.1, 0.1, "body"
    )


def made_up(monkeypatch, share=0.012, ratio=1.03, left=100, peak=2_500_000):
    memory = PrefixMemory(
        *("mlp-digits", 2, 4),
        *(Change(400, left, 100), Change(800, 200, 200), Change(10_000_000, 2_000_000, 1_990_000)),
        *(peak and 2 * peak, peak, None if peak else "nowhere to look"),
    )
    monkeypatch.setattr(bench, "HOOKS_ON", {"mlp-digits": 2})
    monkeypatch.setattr(bench, "PREFIXES_ON", {"mlp-digits": 2})
    monkeypatch.setattr(
        bench, "overheads", lambda *_: [Overhead("mlp-digits", "recorder", Spread(share, share / 2, share * 2), ONE)]
    )
    monkeypatch.setattr(bench, "prefix_costs", lambda *_: [prefix(ratio)])
    monkeypatch.setattr(bench, "prefix_memory", lambda *_: [memory])


def test_limits_that_hold(tmp_path, monkeypatch, capsys):
    made_up(monkeypatch)
    assert bench.run_bench(tmp_path / "new" / "bench.json", "cpu")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["frozen prefixes: mlp-digits", "hooks: mlp-digits"]  # where no bar can be drawn
    assert "mlp-digits recorder 1.20% [0.60%, 2.40%] 2.0% ok 1.000 [0.980, 1.020]" in lines
    times = "1.030 [0.900, 1.100] ok 1.000 [0.980, 1.020] ok"
    assert f"mlp-digits 2/4 {times} 1.00x 1.00x 0.25 0.50 body" in lines
    assert "mlp-digits 2/4 0.0004 -> 0.0001 0.0008 -> 0.0002 10 -> 2 ok 5 -> 2.5" in lines
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["shares"][0]["share"] == {"median": 0.012, "low": 0.006, "high": 0.024}
    assert written["shares"][0]["holds"]
    assert written["fronts"][0]["flops_cached"] == 0.25
    assert written["memory"][0]["gradients"] == {"before": 400, "after": 100, "limit": 100}
    assert written["left_out"] == []
    assert written["versions"]["torch"]


@pytest.mark.parametrize("broken", [{"share": 0.021}, {"ratio": 1.06}, {"left": 104}])
def test_a_limit_that_is_broken(tmp_path, monkeypatch, capsys, broken):
    made_up(monkeypatch, **broken)
    assert not bench.run_bench(tmp_path / "bench.json", "cpu")
    assert capsys.readouterr().out.count("OVER") == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert sum(not row["holds"] for name in ("shares", "fronts", "memory") for row in written[name]) == 1


def test_a_workload_that_cannot_be_had_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    made_up(monkeypatch)
    missing = {"resnet-of-nobody": 2, "tests.evaluate.bench.test_bench:no_package": 2, "mlp-digits": 2}
    monkeypatch.setattr(bench, "PREFIXES_ON", missing)
    assert bench.run_bench(tmp_path / "bench.json", "cpu")
    out = capsys.readouterr().out
    assert "left out: resnet-of-nobody: there is no workload 'resnet-of-nobody'" in out
    assert "left out: tests.evaluate.bench.test_bench:no_package: No module named 'nowhere': pip install" in out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["left_out"]) == 2
    assert len(written["fronts"]) == 1


def no_package():
    """A workload whose package is missing."""
    import nowhere

    return nowhere


def test_a_peak_that_cannot_be_measured_is_no_number(tmp_path, monkeypatch, capsys):
    made_up(monkeypatch, peak=None)
    assert bench.run_bench(tmp_path / "bench.json", "cpu")
    assert "no peak: nowhere to look" in capsys.readouterr().out


def test_the_real_thing_on_something_small(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HOOKS_ON", {"mlp-digits": 2})
    monkeypatch.setattr(bench, "PREFIXES_ON", {"mlp-digits": 2})
    monkeypatch.setattr("evaluate.bench.frozen_prefixes._SECONDS", 0.01)
    bench.run_bench(tmp_path / "bench.json", "cpu")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {row["hooks"] for row in written["shares"]} == set(bench.LIMITS)
    assert [row["frozen"] for row in written["fronts"]] == [1, 2, 3, 4]
    assert [row["frozen"] for row in written["memory"]] == [1, 2, 3, 4]
    assert all(row["holds"] for row in written["memory"])


def test_a_place_that_cannot_be_written_to_fails_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "prefix_costs", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(FileFault, match="--out"):
        bench.run_bench(tmp_path / "file" / "bench.json", "cpu")


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="device='tpu'"):
        bench.run_bench(tmp_path / "bench.json", "tpu")

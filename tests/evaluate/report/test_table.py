"""The table in the terminal."""

import pytest

from evaluate.analysis.area import areas
from evaluate.analysis.oracle_file import read_oracle
from evaluate.analysis.statistics import compare
from evaluate.report.format import distinct_length, plain, shortened
from evaluate.report.table import table
from evaluate.trials.records import read_results


def line_of(text, policy, after):
    lines = text.splitlines()
    return next(line for line in lines[lines.index(after) :] if line.startswith(f"  {policy} "))


def test_every_workload_and_all_of_them_have_a_row_a_policy(folder):
    text = table(read_results(folder), 200)
    for title in ("digits-mlp", "fashion-resnet8", "glosses-transformer", "all workloads"):
        for policy in ("none", "shorter 0.7", "static 0.5", "linear", "smartfrz"):
            assert line_of(text, policy, title)


def test_a_group_of_workloads_has_rows_of_its_own(write, rows):
    groups = {"digits-mlp": "small", "fashion-resnet8": "small"}
    text = table(read_results(write(rows, groups=groups)), 240)
    assert line_of(text, "smartfrz", "all of small")
    assert line_of(text, "smartfrz", "all workloads")


def test_a_row_says_what_was_found(write, trial):
    rows = [
        trial("a", "none", 0, accuracy=0.90, cpu_seconds=100.0, flops=1000),
        trial("a", "none", 1, accuracy=0.80, cpu_seconds=100.0, flops=1000),
        trial("a", "fast", 0, accuracy=0.93, cpu_seconds=50.0, flops=250, policy_seconds=1.5, train_seconds=100.0),
        trial("a", "fast", 1, accuracy=0.83, cpu_seconds=50.0, flops=250, policy_seconds=1.5, train_seconds=100.0),
    ]
    text = table(read_results(write(rows)), 200)
    expected = "fast 88.00 ±7.07 +3.00 [+3.00, +3.00] as accurate 25 % 2.00x [2.00, 2.00] 1.5 % 2/2 0"
    assert line_of(text, "fast", "a").split() == expected.split()
    assert "CPU speedup" in next(line for line in text.splitlines() if line.startswith("policy"))
    assert "ratio of CPU seconds" in text
    assert "all workloads" not in text


def test_a_multiplier_outside_of_the_curve_says_so_and_the_lowest_is_named(write, trial):
    costs = {"none": (0.9, 1000), "shorter 0.5": (0.8, 500), "fast": (0.91, 400), "slow": (0.7, 800)}
    rows = [
        trial(name, label, seed, accuracy=accuracy, flops=flops * factor if label == "fast" else flops)
        for name, factor in (("a", 1), ("b", 2))
        for label, (accuracy, flops) in costs.items()
        for seed in (0, 1)
    ]
    text = table(read_results(write(rows), "flops"), 240)
    assert "2.50x [2.50, 2.50]" in line_of(text, "fast", "a")
    assert "above the curve: at least" in line_of(text, "fast", "a")
    both = line_of(text, "fast", "all workloads")
    assert "1.77x" in both  # of 2.5 and 1.25
    assert "1.25x on b" in both
    assert "above the curve on 2 of 2: at least" in both
    assert "below the curve on 2 of 2: at most" in line_of(text, "slow", "all workloads")
    assert text.splitlines()[1].startswith("Beats training for fewer steps")


def test_a_length_that_the_curve_lacks_is_named(write, trial):
    labels = ("none", "shorter 0.5", "stopped 0.8", "fast")
    rows = [trial("a", label, seed) for label in labels for seed in (0, 1)]
    assert "curve of full training lacks" not in table(read_results(write(rows)), 200)
    rows = [row for row in rows if row["trial_id"] != "a-stopped 0.8-1"]
    assert "may be too large: stopped 0.8 on a\n" in table(read_results(write(rows)), 200)


def test_with_one_trial_at_a_time_the_speedup_is_that_of_the_clock(write, rows):
    text = table(read_results(write([row | {"slots": 1} for row in rows], cost="train_seconds")), 200)
    assert "CPU" not in text
    assert "ratio of wall-clock seconds" in text


def test_costs_can_be_compared_by_flops_whatever_the_suite_took(folder):
    results = read_results(folder, "flops")
    text = table(results, 200)
    assert "by FLOPs: ratio of FLOPs" in text
    assert "speedup" not in text
    row = next(row for row in compare(results) if row.policy == "shorter 0.7" and row.workload is None)
    assert row.speedup.mean == pytest.approx(1 / row.flops_share)


def test_without_an_interval_the_table_says_so(write, trial):
    text = table(read_results(write([trial("a", name, 0, accuracy=0.9) for name in ("none", "same")])), 200)
    assert "+0.00 [?]" in line_of(text, "same", "a")
    assert "cannot tell" in line_of(text, "same", "a")


def test_what_was_left_out_is_listed(folder):
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"trial_id": "cut sho')
    suite = (folder / "suite.json").read_text()
    (folder / "suite.json").write_text(suite.replace('"seeds": [0, 1, 2]', '"seeds": [0, 1, 2, 3]'))
    text = table(read_results(folder), 240)
    assert "diverged: glosses-transformer, linear, seed 2: loss is nan after step 480" in text
    assert "not run: 15 of the suite's trials" in text
    assert "left out: results.jsonl, line 46: cut short" in text
    assert line_of(text, "linear", "glosses-transformer").split()[-2:] == ["2/4", "1"]


def test_trials_lost_for_one_reason_are_one_line(write, trial):
    lost = [trial("a", "spfde", seed, status="failed", error=f"Traceback\n{why}") for seed, why in enumerate("xxy")]
    text = table(read_results(write([trial("a", "none", 0), *lost])), 200)
    assert [line for line in text.splitlines() if line.startswith("failed: ")] == [
        "failed: a, spfde, seeds 0, 1: x",
        "failed: a, spfde, seed 2: y",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_gets_the_columns_below_each_other(folder, width):
    text = table(read_results(folder), width)
    rows = text.split("\n\ndifference:")[0].splitlines()
    assert max(map(len, rows)) <= width
    assert sum(line.startswith("policy") for line in rows) > 1
    assert all(name in text for name in ("accuracy %", "difference", "verdict", "CPU speedup", "FLOPs", "seeds", "div"))


def test_labels_cannot_steer_the_terminal(write, trial, hostile):
    rows = [trial("\x1b]0;title\x07", policy, 0) for policy in ("none", "\x1b[2J", "two\nlines", hostile)]
    text = table(read_results(write(rows, name="\x1b[31mred")), 120)
    assert not [char for char in text if not char.isprintable() and char != "\n"]
    assert "\\x1b[2J" in text
    assert "two\\nlines" in text


def test_labels_are_cut_in_the_middle():
    assert shortened("policy number 14", 16) == "policy number 14"
    assert shortened("policy number 14", 10) == "policy… 14"
    assert len(shortened("x" * 100, 17)) == 17
    assert plain("a\tb") == "a\\tb"


def test_labels_are_cut_no_shorter_than_tells_them_apart(write, trial):
    assert distinct_length(["none", "smartfrz"], 20) == 20
    labels = ["smartfrz, front 0.4, cached", "smartfrz, front 0.7, cached"]
    length = distinct_length(labels, 10)
    assert len({shortened(label, length) for label in labels}) == 2
    assert len({shortened(label, length - 1) for label in labels}) == 1
    assert distinct_length(["x" * 99, "x" * 98 + "y" + "x" * 99], 20) == 60
    text = table(read_results(write([trial("a", "none", 0), *(trial("a", label, 0) for label in labels)])), 200)
    rows = text[: text.index("area under the Pareto front")].splitlines()
    assert len({line.split("  ")[1] for line in rows if line.startswith("  smartfrz")}) == 2


def test_areas_of_families_are_listed_the_largest_first(folder):
    text = table(read_results(folder), 200)
    lines = text[text.index("family ") :].splitlines()
    assert lines[0].split() == ["family", "settings", "area", "to", "shorter", "0.7"]
    assert lines[1] == "area under the Pareto front"
    found = areas(read_results(folder))
    assert [line.strip().split("  ")[0] for line in lines[2:6]] == [row.family.name for row in found]
    assert f"{found[0].area.mean:.3f} [" in lines[2]
    assert line_of(text, "shorter 0.7", "area under the Pareto front").split()[-1] == "-"
    assert "1 for all of it, 0 for 5 percentage points less" in text


def test_without_another_policy_there_is_no_area(write, trial):
    assert "area" not in table(read_results(write([trial("a", "none", 0)])), 200)


def test_the_share_of_an_oracles_saving_has_a_column_where_there_is_an_oracle(write, trial, oracle, tmp_path):
    rows = [trial("a", "none", 0, flops=1000), trial("a", "fast", 0, flops=850), trial("b", "none", 0)]
    rows[1]["accuracy"] = rows[0]["accuracy"]
    results = read_results(write(rows))
    found = {"a": read_oracle(oracle(tmp_path, "a"))}
    text = table(results, 200, found)
    assert line_of(text, "fast", "a").split()[-2:] == ["50", "%"]
    assert line_of(text, "none", "a").split()[-1] == "-"
    assert "Oracle of a: the best of 60 freezing schedules that were tried, chosen on the test set" in text
    assert "racle" not in table(results, 200)


def test_an_area_that_leaves_out_workloads_says_so(write, trial):
    rows = [trial(name, label, 0) for name in ("a", "b") for label in ("none", "fast", "shorter 0.7")]
    whole = table(read_results(write(rows)), 200)
    assert "workloads" not in whole[whole.index("family ") :].splitlines()[0]
    text = table(read_results(write([row for row in rows if row["trial_id"] != "b-fast-0"])), 200)
    assert text[text.index("family ") :].splitlines()[0].endswith("  workloads")
    assert line_of(text, "fast", "area under the Pareto front").endswith("  on 1 of 2 workloads")
    assert line_of(text, "shorter 0.7", "area under the Pareto front").endswith("  all")


def test_what_makes_times_untrustworthy_is_a_note(write, rows):
    assert "Trials ran side by side" in table(read_results(write(rows, cost="train_seconds")), 120)
    assert "Trials ran" not in table(read_results(write(rows)), 120)  # CPU seconds of trials side by side are sound
    rows[0]["adopted"] = True
    assert "Seconds of different machines" in table(read_results(write(rows)), 120)

"""The families' curves as Markdown."""

import pytest

from evaluate.__main__ import main
from evaluate.analysis.oracle_file import read_oracle
from evaluate.report.markdown import markdown
from evaluate.trials.records import read_results


@pytest.fixture
def rows(trial):
    costs = {"none": (1000, 0.9), "static 0.4": (800, 0.895), "static 0.7": (500, 0.88), "shorter 0.7": (700, 0.87)}
    return [
        trial("a", policy, seed, flops=flops, accuracy=accuracy)
        for policy, (flops, accuracy) in costs.items()
        for seed in (0, 1)
    ]


def lines_of(results, oracles=None):
    """The lines without the padding of their cells."""
    return [" ".join(line.split()) for line in markdown(results, oracles or {}).splitlines()]


def test_each_family_has_a_line_with_its_settings_dearest_first(write, rows):
    lines = lines_of(read_results(write(rows), "flops"))
    assert lines[0] == (
        "| policy | settings | FLOPs: pp to `none` | compute multiplier | area | difference to `shorter 0.7` |"
    )
    # 0.8 to 1 at half a point of five lost, and 0.5 to 0.8 at two: .2 x .9 + .3 x .6
    assert lines[2].startswith("| static | 2 | 80 %: -0.5, 50 %: -2.0 | ")
    assert lines[2].endswith(" | 0.360 [0.360, 0.360] | +0.240 [+0.240, +0.240] |")
    assert lines[3] == "| shorter 0.7 | 1 | 70 %: -3.0 | 1.00x [1.00, 1.00] | 0.120 [0.120, 0.120] | - |"
    assert len(lines) == 4


def test_with_an_oracle_there_is_a_column_for_the_share_of_its_saving(write, rows, oracle, tmp_path):
    results = read_results(write(rows), "flops")
    lines = lines_of(results, {"a": read_oracle(oracle(tmp_path, "a"))})
    assert lines[0].endswith("| share of the oracle's saving |")
    assert all(line.count("|") == 8 for line in lines)
    assert "%" in lines[2].split("|")[7]


def test_what_is_missing_from_a_setting_is_named(write, rows, trial):
    lost = [row for row in rows if (row["policy"], row["seed"]) != ("static 0.7", 1)]
    lost.append(trial("a", "static 0.7", 1, status="diverged"))
    assert "80 %: -0.5, 50 %: -2.0 (1 of 2)" in markdown(read_results(write(lost), "flops"), {})


def test_areas_and_costs_are_of_one_measure(write, rows):
    changed = [row | {"cpu_seconds": row["flops"] / 2} for row in rows]
    lines = lines_of(read_results(write(changed), "cpu_seconds"))
    assert "| CPU seconds: pp to `none` |" in lines[0]
    assert "80 %: -0.5, 50 %: -2.0" in lines[2]


def test_the_command_prints_the_table_alone(write, rows, capsys):
    main(["report", str(write(rows)), "--markdown", "--cost", "flops"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("| policy")
    assert all(line.startswith("|") for line in out.splitlines())


def test_a_label_cannot_break_the_table(write, trial):
    rows = [trial("a", "none", 0), trial("a", "one | two\n", 0)]
    lines = markdown(read_results(write(rows)), {}).splitlines()
    assert len(lines) == 3
    assert r"one \| two\n" in lines[2]


def test_an_area_that_leaves_out_a_workload_says_so(write, rows, trial):
    more = [trial("b", policy, seed) for policy in ("none", "shorter 0.7") for seed in (0, 1)]
    static, shorter = sorted(markdown(read_results(write(rows + more), "flops"), {}).splitlines()[2:], reverse=True)
    assert ", on 1 of 2 workloads" in static
    assert "workloads" not in shorter


def test_trainings_that_are_not_run_yet_are_missing_too(write, rows):
    left = [row for row in rows if (row["policy"], row["seed"]) != ("static 0.7", 1)]
    assert "80 %: -0.5, 50 %: -2.0 (1 of 2)" in markdown(read_results(write(left), "flops"), {})

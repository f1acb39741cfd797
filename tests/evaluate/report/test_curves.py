"""The families' curves: which panels there are, in which order, and what becomes of points far away."""

import re

import pytest

from evaluate.analysis.area import areas
from evaluate.analysis.statistics import compare
from evaluate.report.curves import curve_plots
from evaluate.trials.records import read_results


def plots(results):
    return curve_plots(results, compare(results), areas(results))


def texts(plot):
    return re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)


def test_each_family_has_a_panel_the_largest_area_first(folder):
    (plot,) = plots(read_results(folder))
    names = ["smartfrz", "linear", "shorter 0.7", "static 0.5"]
    assert sorted(names) == sorted(text for text in texts(plot) if text in names)
    assert [row.family.name for row in areas(read_results(folder))] == [text for text in texts(plot) if text in names]
    assert re.fullmatch(r"Areas from 0\.\d\d \(.*\) to 0\.\d\d \(.*\)", plot.title)
    assert "Dashed: shorter 0.7." in plot.note
    assert "more than 0.5 percentage points lost" in plot.note


def test_many_families_share_several_figures(many_page):
    results = read_results(many_page.parent)
    found = plots(results)
    ranked = [row.family.name for row in areas(results)]
    assert len(ranked) == 20
    assert len(found) == 2  # four full lines, and what is left
    for plot, part in zip(found, (ranked[:12], ranked[12:]), strict=True):
        panels = [text for text in texts(plot) if re.match("[a-z]", text) and "cost" not in text and "acc" not in text]
        assert len(panels) == len(part)
        assert [name.split(", ")[0][:8] for name in part] == [name.split(", ")[0][:8] for name in panels]


def test_without_a_rival_or_an_area_there_are_curves_all_the_same(write, trial):
    rows = [trial("digits-mlp", label, seed) for label in ("none", "linear 1", "linear 2") for seed in (0, 1)]
    (plot,) = plots(read_results(write(rows)))
    assert plot.title.startswith("An area of 0.")
    assert "Dashed" not in plot.note
    results = read_results(write(rows))
    assert curve_plots(results, compare(results), [])[0].title == "Without an area: linear"


def test_without_a_pair_there_is_no_curve(write, trial):
    assert plots(read_results(write([trial("a", "none", 0)]))) == []
    failed = trial("a", "linear", 0, status="failed", accuracy=None)
    assert plots(read_results(write([trial("a", "none", 0), failed]))) == []


@pytest.mark.parametrize(("changes", "hollow"), [({}, 0), ({"accuracy": 0.4}, 1), ({"cpu_seconds": 1e6}, 1)])
def test_what_lies_beyond_a_panel_stands_hollow_at_its_edge(write, trial, changes, hollow):
    usual = {"accuracy": 0.9, "cpu_seconds": 50.0}
    rows = [trial("a", "none", seed, **usual) for seed in (0, 1)]
    rows += [trial("a", "linear", seed, **usual | changes) for seed in (0, 1)]
    (plot,) = plots(read_results(write(rows)))
    markers = re.findall(r'<use [^>]*style="[^"]*var\(--c1\)[^"]*"', plot.svg)
    assert sum("fill-opacity: 0" in marker or "fill: none" in marker for marker in markers) == hollow

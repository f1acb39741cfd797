"""What the figures are drawn from: frozen spans, the Pareto front, colours and markers."""

import dataclasses
import re

import pytest

from evaluate.analysis.families import families
from evaluate.analysis.statistics import compare
from evaluate.report.over_time import frozen_share, frozen_spans, loss_plot, step_cost_plot, timeline_plots
from evaluate.report.svg import colour, drawn, marker, swatch
from evaluate.report.tradeoff import Point, Span, overall_plot, pareto, relative_points, workload_plot
from evaluate.trials.records import read_results


def frozen(write, trial, events, steps=100, layers=3):
    freezes = [{"step": step, "froze": [], "thawed": [], "frozen": frozen} for step, frozen in events]
    row = trial("a", "none", 0, freezes=freezes, steps=steps, layers=[f"layer {index}" for index in range(layers)])
    return read_results(write([row])).trials[0]


def test_spans_run_from_freezing_to_unfreezing(write, trial):
    found = frozen(write, trial, [(10, [0]), (40, [0, 2]), (70, [2])])
    assert frozen_spans(found) == [[(10, 70)], [], [(40, 100)]]
    assert frozen_share(found) == pytest.approx((60 + 60) / 300)


def test_a_layer_that_is_unfrozen_and_freezes_again_has_two_spans(write, trial):
    assert frozen_spans(frozen(write, trial, [(0, [0]), (20, []), (60, [0])]))[0] == [(0, 20), (60, 100)]


def test_a_training_that_stopped_early_ends_its_spans(write, trial):
    assert frozen_spans(frozen(write, trial, [(10, [0]), (150, [0, 1])], steps=100)) == [[(10, 100)], [], []]
    assert frozen_share(frozen(write, trial, [], steps=0)) == 0.0


def test_the_pareto_front_holds_what_nothing_beats():
    values = {"cheap": (1, 1), "worse": (2, 0.5), "good": (2, 3), "same cost": (2, 2), "dear": (5, 3), "best": (6, 4)}
    points = [Point(0, name, Span(x, x, x), Span(y, y, y)) for name, (x, y) in values.items()]
    assert [point.label for point in pareto(points)] == ["cheap", "good", "best"]
    assert pareto([]) == []
    lost = [dataclasses.replace(point, whole=point.label != "cheap") for point in points]
    assert [point.label for point in pareto(lost)] == ["good", "best"]


def test_forty_two_policies_and_the_baseline_look_different():
    assert len({(colour(index), marker(index)) for index in range(43)}) == 43


def test_titles_state_what_is_seen(folder):
    results = read_results(folder)
    rows = compare(results)
    assert overall_plot(results, rows).title == "Not beaten in both accuracy and cost: shorter 0.7, smartfrz, none"
    assert loss_plot(results, "digits-mlp").title == (
        "Test loss ends lowest under none (0.31), highest under static 0.5 (0.341)"
    )
    assert "a step under smartfrz costs 4" in step_cost_plot(results, "fashion-resnet8").title
    plots, idle = timeline_plots(results, "digits-mlp")
    assert [plot.title.split(" kept ")[0] for plot in plots] == ["static 0.5", "linear", "smartfrz"]
    assert plots[0].title == "static 0.5 kept 50 % of layers x steps frozen"
    assert idle == ["none", "shorter 0.7"]


def test_each_seed_has_a_panel_and_a_lost_one_says_so(folder):
    plots, _ = timeline_plots(read_results(folder), "glosses-transformer")
    linear = plots[1].svg
    assert [f"seed {seed}" in linear for seed in range(3)] == [True] * 3
    assert "seed 2, diverged" in linear


def test_no_step_is_called_cheaper_that_is_not(write, trial):
    rows = [trial("digits-mlp", policy, 0) for policy in ("none", "shorter 0.7")]
    assert step_cost_plot(read_results(write(rows)), "digits-mlp").title == (
        "Towards the end no policy's step is cheaper than one under none"
    )


def test_nothing_is_drawn_from_nothing(write, trial):
    empty = {"curve": [], "step_cost": [], "freezes": [], "layers": [], "accuracy": None, "loss": None}
    results = read_results(write([trial("a", "none", 0, status="failed", **empty)]))
    assert loss_plot(results, "a") is None
    assert step_cost_plot(results, "a") is None
    assert timeline_plots(results, "a") == ([], [])
    assert workload_plot(results, compare(results), "a") is None
    assert overall_plot(results, compare(results)).title == "Nothing to compare yet"


def test_figures_take_colours_and_fonts_from_the_page():
    def draw(figure):
        figure.add_subplot(title="#ab0011 costs 12.3456 $x^2$").plot([0, 1], [2, 3], color=colour(2))

    svg = drawn(2.0, draw, 'a "title" & more')
    assert svg.startswith('<svg viewBox="0 0 345.6 144" role="img" aria-label="a &quot;title&quot; &amp; more">')
    assert "stroke: var(--c2)" in svg
    assert "fill: currentColor" in svg
    assert "font-family" not in svg
    assert "<style" not in svg
    assert "#ab0011 costs 12.3456 $x^2$" in svg  # text is left as it is
    assert not re.search(r"\d\.\d{3,}", re.sub(r">[^<]*<", "><", svg))


def test_swatches_show_the_policys_own_colour():
    assert "var(--c0)" in swatch(0)
    assert "var(--c3)" in swatch(3)


def test_a_loss_that_was_taken_once_is_no_line(write, trial):
    once = [{"step": 10, "epoch": 1.0, "train_loss": 0.5, "test_loss": 0.4, "test_accuracy": 0.9, "train_seconds": 1.0}]
    rows = [trial("a", policy, 0, curve=once) for policy in ("none", "linear")]
    assert loss_plot(read_results(write(rows)), "a") is None
    rows = [trial("a", policy, 0, curve=[{**once[0], "step": 5}, *once]) for policy in ("none", "linear")]
    assert loss_plot(read_results(write(rows)), "a") is not None


def test_settings_of_a_policy_share_a_panel_and_their_looks(write, trial):
    labels = ("none", "static 0.3", "static 0.6", "linear")
    results = read_results(write([trial("digits-mlp", label, seed) for label in labels for seed in (0, 1)]))
    plot = step_cost_plot(results, "digits-mlp")
    titles = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg) if text in (*labels, "static")]
    assert titles == ["static", "linear"]
    assert plot.note == "Grey: the baseline. Several settings of a policy: the paler, the later in the suite."
    assert [point.index for point in relative_points(results, compare(results))] == [0, 1, 1, 2]
    assert "Markers that look alike are settings of one policy." in overall_plot(results, compare(results)).note


def test_of_many_policies_a_timeline_shows_a_family(many_page):
    results = read_results(many_page.parent)
    plots, idle = timeline_plots(results, "digits-mlp")
    names = [family.name for family in families(results)]
    assert {*(plot.title.split(" kept ")[0] for plot in plots), *idle} == set(names)
    static = next(plot for plot in plots if plot.title.startswith("static kept "))
    assert re.fullmatch(r"static kept \d+( to \d+)? % of layers x steps frozen", static.title)
    assert [f"static {setting}" in static.svg for setting in (0.3, 0.5, 0.7)] == [True] * 3


def test_a_policy_that_learned_nothing_stands_hollow_at_the_edge_and_leaves_the_others_their_room(write, trial):
    accuracies = {"none": 0.90, "good": 0.89, "lost": 0.10}
    rows = [trial("a", name, seed, accuracy=value) for name, value in accuracies.items() for seed in (0, 1)]
    results = read_results(write(rows))
    plots = [overall_plot(results, compare(results)), workload_plot(results, compare(results), "a")]
    assert all(plot.note.endswith("Hollow, at the edge: lies beyond it.") for plot in plots)
    near = read_results(write([row for row in rows if row["policy"] != "lost"]))
    assert "Hollow" not in overall_plot(near, compare(near)).note

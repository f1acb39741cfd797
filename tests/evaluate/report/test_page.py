"""The report's page as a file: complete, self-contained, escaped, and readable in both colour schemes."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluate.analysis.area import areas
from evaluate.analysis.compute_multiplier import compute_multipliers
from evaluate.analysis.statistics import compare
from evaluate.report.page import distinct, make_report
from evaluate.report.tradeoff import pareto, relative_points
from evaluate.trials.records import read_results
from predictor.errors import FileFault


class Elements(HTMLParser):
    """Every tag with its attributes, and the text of every table cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.cells[-1] = " ".join(f"{self.cells[-1]} {data}".split())


@pytest.fixture(scope="module")
def text(page):
    return page.read_text(encoding="utf-8")


def luminance(colour):
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def schemes():
    """The variables of the light and of the dark scheme."""
    style = (Path(__file__).parents[3] / "evaluate" / "report" / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    return [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", block)) for block in blocks]


def test_the_page_is_named_after_the_suite_and_holds_every_row(page, text):
    assert "<title>Made-up suite</title>" in text
    cells = Elements(text).cells
    for row in compare(read_results(page.parent)):
        assert row.policy in cells
        assert row.workload in cells or row.workload is None
    assert "-0.10 [-0.32, +0.12]".replace("-", "\N{MINUS SIGN}") in cells
    assert "1.30x [1.29, 1.31]" in cells
    assert "▼ less accurate" in cells
    assert "✓ as accurate" in cells
    assert "? cannot tell" in " ".join(cells)


def test_the_headline_and_what_is_left_out_stand_above_the_first_table(text):
    head = text[: text.index("<table")]
    assert "smartfrz, 1.28 times as fast" in head
    assert "1 diverged, 0 failed, 0 not run" in head
    assert "Cost in CPU seconds" in head


def test_the_compute_multiplier_comes_first(page, text):
    found = compute_multipliers(read_results(page.parent))[None, "smartfrz"]
    figure = f"{found.value.mean:.2f}x"
    head = text[text.index('class="headline"') : text.index('class="meta"')]
    assert f"smartfrz, compute multiplier {figure}" in head
    assert f"lowest {found.lowest[1]:.2f}x on {found.lowest[0]}" in head
    row = next(row for row in re.findall(r"<tr>.*?</tr>", text, flags=re.DOTALL) if 'title="smartfrz"' in row)
    assert Elements(row).cells[3].startswith(f"{figure} [")
    # Full training's curve is the first figure: every length is named, and policies with their multipliers.
    curve = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)[0]
    named = re.findall(r"<text[^>]*>([^<]*)</text>", curve)
    assert {"none", "shorter 0.7", f"smartfrz {figure}"} <= set(named)


def test_a_policy_outside_of_the_curve_says_so_in_words(write, trial):
    accuracies = {"none": 0.9, "shorter 0.7": 0.88, "better": 0.91, "worse": 0.87}
    rows = [
        trial(name, label, seed, accuracy=accuracy, flops=1000 if label == "none" else 700)
        for name in ("a", "b")
        for label, accuracy in accuracies.items()
        for seed in (0, 1)
    ]
    text = make_report(write(rows)).read_text(encoding="utf-8")
    cells = [cell for cell in Elements(text).cells if "curve" in cell]
    assert [sum(word in cell for cell in cells) for word in ("at least", "at most")] == [4, 4]
    assert "above the curve on 2 of 2: at least" in " ".join(cells)


def test_every_figure_is_there(text):
    tags = Elements(text).tags
    # two over all, one of curves; for each workload full training's curve, accuracy, loss and step cost, and timelines
    # of three that freeze
    assert sum(tag == "figure" for tag, _ in tags) == 3 + 3 * (4 + 3)
    named = [attributes["aria-label"] for tag, attributes in tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(named) == len(set(named)) == 24


def test_the_set_up_is_shown(text):
    for value in ("Some CPU @ 2.5 GHz", "2.14.1", "recipe.epochs", "diverged</b>: glosses-transformer, linear, seed 2"):
        assert value in text


def test_the_page_asks_for_nothing(text):
    for _, attributes in Elements(text).tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), attributes
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_policy_allows_exactly_the_one_script(text):
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_references_inside_the_page_find_exactly_one_target(text):
    tags = Elements(text).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:xlink:)?href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets
    assert targets <= set(ids)


def test_no_placeholder_colour_is_left_and_every_variable_is_defined_twice(text):
    assert "#ab00" not in text
    light, dark = schemes()
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", text)) <= light.keys() == dark.keys()
    assert {f"c{number}" for number in range(7)} <= light.keys()


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(scheme):
    colours = schemes()[scheme]
    for name in ("ink", "soft", "link", "good", "bad"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for number in range(7):
        assert contrast(colours[f"c{number}"], colours["paper"]) >= 3, number
        assert contrast(colours[f"c{number}"], colours["band"]) >= 3, number


def test_hostile_names_are_text(hostile_page):
    text = hostile_page.read_text(encoding="utf-8")
    tags = [tag for tag, _ in Elements(text).tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "b" in tags
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]  # no template is filled in
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_busy_policy_does_not_fill_the_page(write, trial):
    """100 trials stay under 3 MB even when every second one changes the frozen set at every other step."""
    freezes = [
        {"step": step, "froze": [], "thawed": [], "frozen": [index for index in range(48) if (step + index) % 3]}
        for step in range(0, 1200, 2)
    ]
    layers = [f"layer {index}" for index in range(48)]
    rows = [trial("digits-mlp", policy, seed) for policy in ("none", "busy") for seed in range(5)]
    rows = [row if row["policy"] == "none" else row | {"freezes": freezes, "layers": layers} for row in rows]
    assert make_report(write(rows)).stat().st_size < 3e6 / 10


def test_a_suite_in_which_nothing_finished_has_a_page(write, trial):
    empty = {"status": "failed", "accuracy": None, "loss": None, "error": "Traceback\n  out of memory", "curve": []}
    text = make_report(write([trial("a", name, 0, **empty) for name in ("none", "fast")])).read_text(encoding="utf-8")
    assert "No policy is shown to be as accurate" in text
    assert "failed</b>: a, fast, seed 0" in text
    assert "<code>  out of memory</code>" in text


def test_the_page_is_the_same_each_time_and_leaves_nothing_else(write, trial):
    folder = write([trial("a", policy, 0) for policy in ("none", "linear")])
    first = make_report(folder).read_text(encoding="utf-8")
    assert make_report(folder).read_text(encoding="utf-8") == first
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.jsonl", "suite.json"]


def test_the_earlier_page_stays_when_the_new_one_cannot_be_made(folder):
    (folder / "report.html").write_text("earlier")
    (folder / "suite.json").write_text("{}")
    with pytest.raises(FileFault, match=r"suite\.json"):
        make_report(folder)
    assert (folder / "report.html").read_text() == "earlier"


def test_settings_that_differ_are_counted():
    found = distinct([{"cpu": "A", "gpu": {"name": None}}, {"cpu": "B", "gpu": {"name": None}}, {"cpu": "A"}])
    assert found == [("cpu", [("A", 2), ("B", 1)]), ("gpu.name", [("none", 2)])]
    assert distinct([{"lr": 0.1, "layers": [1, 2]}]) == [("lr", [("0.1", 1)]), ("layers", [(json.dumps([1, 2]), 1)])]


def test_a_cache_is_told_of_where_there_was_one(write, trial, text):
    caches = [{"hits": hits, "misses": 100 - hits} for hits in (60, 70)]
    rows = [trial("a", name, seed) for name in ("none", "other") for seed in (0, 1)]
    rows += [trial("a", "static, cached", seed, cache=cache) for seed, cache in enumerate(caches)]
    page = make_report(write(rows)).read_text(encoding="utf-8")
    assert "the frozen prefix was skipped: static, cached, 65 % of the samples. FLOPs" in page
    assert "the frozen prefix was skipped" not in text


@pytest.fixture(scope="module")
def many(many_page):
    return many_page.read_text(encoding="utf-8")


def test_forty_five_policies_are_drawn_by_family(many):
    tags = Elements(many).tags
    # two over all, two of curves; full training's curve, accuracy, loss, step cost, and timelines of all families that
    # freeze
    timelines = len(re.findall("% of layers x steps frozen</figcaption>", many))
    assert sum(tag == "figure" for tag, _ in tags) == 4 + 4 + timelines
    assert 18 <= timelines <= 20
    assert "45 policies of 21 kinds" in many
    assert sum(tag == "tbody" for tag, _ in tags) == 21 + 1 + 21 + 1  # verdicts, areas, full table, trials
    assert len(many) < 2e6


def test_only_the_unbeaten_of_many_are_named_in_the_overall_plot(many_page, many):
    results = read_results(many_page.parent)
    plot = re.findall(r"<figure>.*?</figure>", many, flags=re.DOTALL)[1]
    front = pareto(relative_points(results, compare(results)))
    named = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot) if text in results.policies]
    assert named
    assert set(named) <= {point.label for point in front}
    assert "Named, and with whiskers: those on the Pareto front." in plot


def test_areas_stand_in_a_table_the_largest_first(many_page, many):
    (table,) = re.findall(r'<table class="areas sortable">.*?</table>', many, flags=re.DOTALL)
    cells = Elements(table).cells
    assert cells[:4] == ["Policy", "Settings", "Area", "Difference to shorter"]
    found = areas(read_results(many_page.parent))
    assert cells[4::4] == [row.family.name for row in found]
    assert cells[5::4] == [str(len(row.family.members)) for row in found]
    first = found[0].area
    assert cells[6] == f"{first.mean:.3f} [{first.low:.3f}, {first.high:.3f}]".replace("-", "\N{MINUS SIGN}")
    assert cells[4 + 4 * cells[4::4].index("shorter") + 3] == "\N{EN DASH}"


def test_the_oracles_saving_has_a_column_where_there_is_an_oracle(many, text):
    assert "Of the oracle's saving" not in text
    assert "oracle" not in text[text.index("<body") :].lower()
    assert many.count(">Of the oracle's saving<") == 1
    assert "the best of 60 freezing schedules that were tried, chosen on the test set" in many
    rows = re.findall(
        r"<tr>(?:(?!</tr>).)*</tr>", many[many.index('id="table"') : many.index('id="trials"')], flags=re.DOTALL
    )
    shares = {cells[1]: cells[8] for row in rows if len(cells := Elements(row).cells) == 13 and cells[0] != "Workload"}
    assert len(shares) == 45
    assert shares["none"] == "-"
    assert all(share.endswith(" %") for label, share in shares.items() if label != "none")


def test_an_oracle_that_does_not_fit_is_named_and_not_used(write, trial, oracle):
    folder = write([trial("digits-mlp", label, 0) for label in ("none", "linear")])
    oracle(folder.parent / "elsewhere", "digits-mlp", source="<b>other</b>")
    page = make_report(folder, folder.parent / "elsewhere").read_text(encoding="utf-8")
    assert "oracle not used</b>: " in page
    assert "Of the oracle" not in page
    assert "none: every planned trial finished" not in page


def test_each_policys_card_is_closed_until_it_is_asked_for(many):
    section = many[many.index('<section id="policies">') : many.index('<section id="left-out">')]
    assert section.count("<details>") == 16
    assert "<details open>" not in section
    assert "<b>shorter</b> Trains every layer for fewer steps" in section
    assert "<b>Rule.</b> steps = round(budget * planned steps)." in section


def test_what_was_not_run_is_told_by_policy(write, trial):
    folder = write([trial("a", "none", 0)], policies=["none", "late"], seeds=[0, 1, 2])
    page = make_report(folder).read_text(encoding="utf-8")
    assert "not run</b>: 5 trials" in page
    assert "<li>a, none, seed 1, 2</li>" in page
    assert "<li>a, late, seed 0, 1, 2</li>" in page

"""The report in a real browser: what a reader sees on a desk and on a phone, in light and in dark, with no network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluate.analysis.statistics import compare
from evaluate.trials.records import read_results

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class Browser:
    """A tab of Chromium, and what went wrong in it since a page was opened."""

    def __init__(self, tab: Any) -> None:
        self._tab = tab
        self.faults: list[str] = []
        tab.on("console", lambda message: self.faults.append(message.text))
        tab.on("pageerror", lambda error: self.faults.append(str(error)))
        tab.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: self._requested(request.url))

    def open(self, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a page as a screen of this width with this preference shows it."""
        self.faults.clear()
        self._tab.emulate_media(color_scheme=scheme)
        self._tab.set_viewport_size({"width": width, "height": height})
        self._tab.goto(page.as_uri())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._tab.evaluate(script)

    def _requested(self, address: str) -> None:
        if not address.startswith(("file://", "data:")):
            self.faults.append(address)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Browser(chromium.new_page())
        chromium.close()


# Texts of figures that stick out of their figure by more than two pixels, where they would be cut off.
CUT_OFF = """
[...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    const beside = box.left < frame.left - 2 || box.right > frame.right + 2;
    return beside || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
  }).map((text) => text.textContent);
})
"""
VERDICTS = """
[...document.querySelectorAll(".verdicts tbody tr")].map((row) => [
  row.querySelector("th").innerText, row.querySelector(".verdict").innerText.replace(/^\\W+/, "")
])
"""
# The texts of a column of the full table.
COLUMN = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{}].innerText)"
SIZES = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]


def number(text: str) -> float:
    return float(text.split()[0].replace("\N{MINUS SIGN}", "-").rstrip("x"))


@pytest.mark.parametrize(("scheme", "width"), SIZES)
def test_a_reader_sees_the_whole_page(browser: Browser, page: Path, scheme: str, width: int) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.faults == []
    assert browser.run("document.title") == "Made-up suite"
    assert browser.run("document.documentElement.scrollWidth") <= width
    rows = [row for row in compare(read_results(page.parent)) if row.workload is None]
    assert browser.run(VERDICTS) == [[row.policy, row.verdict] for row in rows]
    drawn = browser.run("[...document.querySelectorAll('figure svg')].map((svg) => svg.getBoundingClientRect().height)")
    assert len(drawn) == 24
    assert min(drawn) > 80
    assert browser.run(CUT_OFF) == []


@pytest.mark.parametrize(("scheme", "width"), SIZES)
def test_hostile_names_do_nothing_and_fit(browser: Browser, hostile_page: Path, scheme: str, width: int) -> None:
    browser.open(hostile_page, width=width, scheme=scheme)
    assert browser.faults == []  # an alert would have stopped the page from loading, a blocked one would be reported
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CUT_OFF) == []
    names = read_results(hostile_page.parent).policies
    assert browser.run("[...document.querySelectorAll('.verdicts .policy')].map((cell) => cell.title)") == list(names)
    assert browser.run("document.querySelectorAll('.verdicts tbody tr').length") == 20


def test_the_first_screen_has_the_verdicts_and_the_main_plot(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=900)
    for part in ("h1", ".headline", ".verdicts", "main figure svg"):
        assert 0 < browser.run(f"document.querySelector('{part}').getBoundingClientRect().bottom") <= 900, part


def test_text_in_figures_is_legible_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=844)
    heights = browser.run(
        "[...document.querySelectorAll('figure svg text')].filter((t) => !t.getAttribute('transform'))"
        ".map((t) => t.getBoundingClientRect().height)"
    )
    assert min(heights) > 10


@pytest.mark.parametrize(("scheme", "paper", "ink"), [("light", 255, 28), ("dark", 20, 228)])
def test_figures_follow_the_colour_scheme(browser: Browser, page: Path, scheme: str, paper: int, ink: int) -> None:
    browser.open(page, scheme=scheme)
    red = "parseInt(getComputedStyle(document.querySelector('{}')).{}.slice(4))"
    assert browser.run(red.format("body", "backgroundColor")) == paper
    assert browser.run(red.format("body", "color")) == ink
    assert browser.run(red.format("figure svg text", "fill")) == ink
    lines = "[...document.querySelectorAll('figure svg *')].map((part) => getComputedStyle(part).stroke)"
    expected = {"light": "rgb(0, 104, 176)", "dark": "rgb(86, 168, 240)"}
    assert expected[scheme] in browser.run(lines)


def test_a_click_on_a_heading_sorts_the_table(browser: Browser, page: Path) -> None:
    browser.open(page)
    heading = "document.querySelectorAll('#table thead th')[{}]"
    before = browser.run(COLUMN.format(3))
    browser.run(heading.format(3) + ".querySelector('button').click()")
    values = [number(text) for text in browser.run(COLUMN.format(3)) if text != "\N{EN DASH}"]
    assert len(values) == 16
    assert values == sorted(values)
    assert browser.run(heading.format(3) + ".getAttribute('aria-sort')") == "ascending"
    browser.run(heading.format(5) + ".querySelector('button').click()")
    browser.run(heading.format(5) + ".querySelector('button').click()")
    values = [number(text) for text in browser.run(COLUMN.format(5)) if text != "\N{EN DASH}"]
    assert values == sorted(values, reverse=True)
    assert browser.run(heading.format(3) + ".getAttribute('aria-sort')") is None
    assert sorted(browser.run(COLUMN.format(3))) == sorted(before)


@pytest.mark.parametrize(("scheme", "width"), SIZES)
def test_forty_five_policies_fit(browser: Browser, many_page: Path, scheme: str, width: int) -> None:
    browser.open(many_page, width=width, scheme=scheme)
    assert browser.faults == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CUT_OFF) == []
    assert browser.run("document.querySelectorAll('.verdicts tbody tr').length") == 45
    assert browser.run("document.documentElement.scrollHeight") < (18_000 if width < 600 else 12_000)


def test_headings_stay_in_sight_while_a_long_table_scrolls(browser: Browser, many_page: Path) -> None:
    browser.open(many_page)
    for box in (".box", "#table .scroll"):
        browser.run(f"document.querySelector('{box}').scrollTop = 900")
        top = f"document.querySelector('{box} thead th').getBoundingClientRect().top"
        assert 0 <= browser.run(f"{top} - document.querySelector('{box}').getBoundingClientRect().top") <= 2
        assert browser.run(f"document.querySelector('{box} tbody tr').getBoundingClientRect().bottom - {top}") < 0


def test_sorting_takes_groups_apart_and_loses_no_row(browser: Browser, many_page: Path) -> None:
    browser.open(many_page)
    column = "[...document.querySelectorAll('.verdicts tbody tr')].map((row) => row.cells[3].innerText)"
    before = browser.run(column)
    browser.run("document.querySelectorAll('.verdicts thead button')[3].click()")
    after = browser.run(column)
    assert sorted(after) == sorted(before)
    values = [number(text) for text in after]
    assert values == sorted(values)
    assert browser.run("document.querySelectorAll('.verdicts tbody').length") == 1

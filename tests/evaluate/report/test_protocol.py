"""What is said of how costs came about: on the page always, in the terminal where they are not to be trusted."""

import pytest

from evaluate.report.page import render
from evaluate.report.protocol import protocol
from evaluate.trials.records import read_results

ALONE = "Trials ran one at a time, interleaved."
COMPANY = "Trials ran side by side, so wall-clock times compare the company that a trial had"
MACHINES = "Seconds of different machines stand beside each other"


@pytest.fixture
def told(write, trial):
    """What is said of two trials, the second with these changes."""

    def make(cost, slots=1, **changes):
        rows = [trial("a", "none", 0, slots=slots), trial("a", "fast", 0, slots=slots, **changes)]
        return protocol(read_results(write(rows, cost=cost)))

    return make


@pytest.mark.parametrize("cost", ["train_seconds", "cpu_seconds"])
def test_one_at_a_time(told, cost):
    assert (told(cost).sentence, told(cost).warning) == (ALONE, False)
    failed = {"status": "failed", "accuracy": None, "hardware": {}}
    assert told(cost, **failed).sentence == ALONE  # it names no machine


def test_side_by_side_the_clock_on_the_wall_tells_nothing(told):
    by_wall, by_cpu = told("train_seconds", slots=2), told("cpu_seconds", slots=2)
    assert by_wall.sentence.startswith(COMPANY)
    assert by_wall.warning
    assert by_cpu.sentence.startswith("Trials ran side by side, so wall-clock times would compare the company")
    assert not by_cpu.warning


@pytest.mark.parametrize("cost", ["train_seconds", "cpu_seconds"])
@pytest.mark.parametrize(
    "changes",
    [{"adopted": True}, {"hardware": {"cpu": "Another CPU"}}, {"hardware": {"cpu": "Some CPU", "gpu": "A GPU"}}],
)
def test_seconds_of_two_machines_are_not_compared(told, cost, changes):
    found = told(cost, **changes)
    assert found.sentence.startswith(MACHINES)
    assert "--cost flops" in found.sentence
    assert found.warning


def test_flops_are_the_same_everywhere(told):
    found = told("flops", slots=2, adopted=True)
    assert found.sentence.startswith("Costs are FLOPs and not times")
    assert not found.warning


def test_the_page_says_what_the_trials_tell_and_not_what_the_axis_does(write, trial):
    rows = [trial("a", name, seed) for name in ("none", "fast") for seed in (0, 1)]
    page = render(read_results(write(rows, cost="train_seconds")))
    assert ALONE not in page
    assert f"<b>{COMPANY}" in page
    page = render(read_results(write([row | {"slots": 1} for row in rows], cost="train_seconds")))
    assert ALONE in page

"""The README's table and picture, from the trials that are published."""

import re

import pytest

from evaluate.analysis.compute_multiplier import compute_multipliers
from evaluate.report.published import PICTURE, _name, publish
from evaluate.trials.adopt import published_results


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    picture = tmp_path_factory.mktemp("published") / "picture.svg"
    return publish(picture), picture.read_text()


def test_the_table_names_every_kind_of_training_and_a_rival(published):
    table, _ = published
    for text in (
        "from scratch",
        "fine-tuning",
        "to convergence",
        "SmartFRZ",
        "frozen one by one from 70 to 95 % of the steps, early stop: 13 %",
    ):
        assert text in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_lengths_of_full_training_are_named_in_words():
    assert _name("stopped 0.9") == "stopped at 90 % of the steps"
    assert _name("shorter 0.5, linear") == "trained for 50 % of the steps (linear)"


def test_the_picture_is_small_and_readable_on_light_and_dark(published):
    _, svg = published
    assert PICTURE.exists()
    assert len(svg) < 200_000
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"#ab00", svg)


def test_the_published_multipliers():
    found = compute_multipliers(published_results("finetune"))
    assert found[None, "smartfrz"].value.mean == pytest.approx(1.14, abs=0.005)
    assert found[None, "smartfrz, front 0.4, cached"].value.mean == pytest.approx(1.44, abs=0.005)

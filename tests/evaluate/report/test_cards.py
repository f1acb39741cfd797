"""Cards out of docstrings."""

import pytest

from evaluate.report.cards import PARTS, cards
from predictor.policies import POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_tells_all_that_a_card_tells(name):
    (card,) = cards([name])
    assert [title for title, _ in card.parts] == list(PARTS)
    assert all(text and "\n" not in text for text in (card.summary, *dict(card.parts).values(), *card.rest))


def test_a_card_has_the_docstrings_own_words():
    (card,) = cards(["shorter"])
    assert card.summary.startswith("Trains every layer for fewer steps")
    assert dict(card.parts)["Rule"].startswith("steps = round(budget * planned steps). With")
    assert dict(card.parts)["Cost"] == "none."
    assert card.rest[-2] == "budget: the share of the planned steps, above 0 and at most 1."


def test_names_of_no_policy_have_no_card_and_import_nothing():
    assert [card.policy for card in cards(["none", "gone", "antigravity:Policy", "static"])] == ["none", "static"]

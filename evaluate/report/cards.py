"""What each policy of a report is, read from its class: the card in its docstring."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = ("Paper", "Rule", "Signal", "Differs", "Cost")
"""What a card says, in this order."""


@dataclass(frozen=True)
class Card:
    """A policy's docstring in its parts, each as one line."""

    policy: str
    summary: str
    parts: tuple[tuple[str, str], ...]
    """Each of PARTS with its text."""
    rest: tuple[str, ...]
    """The other paragraphs, about the options."""


def cards(names: Iterable[str]) -> list[Card]:
    """The cards of the policies with these names; a name that no policy has any more is left out."""
    from predictor.policies import POLICIES  # torch, which no other part of a report needs

    return [_card(name, inspect.cleandoc(POLICIES[name].__doc__ or "")) for name in names if name in POLICIES]


def _card(name: str, text: str) -> Card:
    summary, *paragraphs = text.split("\n\n")
    card, rest = "", []
    for paragraph in paragraphs:
        if paragraph.startswith(tuple(f"{part}: " for part in PARTS)):
            card += f" {_one_line(paragraph)}"
        elif paragraph.startswith(("Args:\n", "Raises:\n")):
            rest += re.split(r"\n {4}(?=\S)", paragraph)[1:]
        else:
            rest.append(paragraph)
    pieces = re.split(rf"(?<=\s)({'|'.join(PARTS)}): ", card)[1:]
    parts = tuple((title, content.strip()) for title, content in zip(pieces[::2], pieces[1::2], strict=True))
    return Card(name, _one_line(summary), parts, tuple(map(_one_line, rest)))


def _one_line(text: str) -> str:
    return " ".join(text.split())

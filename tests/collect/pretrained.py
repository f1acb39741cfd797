"""Marks for tests that need pretrained weights, which not every machine has."""

import importlib.util

import pytest

from data.locations import PLACES


def needs(place: str, package: str) -> pytest.MarkDecorator:
    missing = PLACES[place].find() is None or importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"python -m data prepare --install; pip install {package}")


needs_lite, needs_minilm = needs("efficientnet-lite0", "timm"), needs("minilm", "transformers")

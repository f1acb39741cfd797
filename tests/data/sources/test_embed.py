"""The embedded slices are what `python -m data.sources.embed` makes, and lie beside their licences."""

import gzip
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.locations import ASSETS, LOCATIONS
from data.sources import embed
from data.sources.images import FASHION_SLICE
from data.sources.text import GLOSS_SLICE


@pytest.mark.skipif(LOCATIONS["fashion-full"].find() is None, reason="Debian's dataset-fashion-mnist is not installed")
def test_the_fashion_slice_can_be_made_again() -> None:
    with np.load(ASSETS / FASHION_SLICE) as embedded, np.load(io.BytesIO(embed.fashion_bytes())) as made:
        assert {*embedded} == {*made} == {"train_images", "train_labels", "test_images", "test_labels"}
        assert all(np.array_equal(embedded[key], made[key]) for key in made)


@pytest.mark.skipif(LOCATIONS["glosses-full"].find() is None, reason="Debian's wordnet-base is not installed")
def test_the_gloss_slice_can_be_made_again_of_the_commonest_classes() -> None:
    assert gzip.decompress((ASSETS / GLOSS_SLICE).read_bytes()) == gzip.decompress(embed.gloss_bytes())
    folder = LOCATIONS["glosses-full"].find()
    assert folder
    lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    counts = Counter(line.split(" ")[1] for line in lines if not line.startswith("  "))
    assert {label for label, _ in counts.most_common(10)} == set(embed.NOUN_CLASSES)


def test_no_gloss_stands_in_the_slice_twice() -> None:
    lines = gzip.decompress((ASSETS / GLOSS_SLICE).read_bytes()).decode().splitlines()
    assert len({line.split("\t")[2] for line in lines}) == len(lines) == 8000


def test_main_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "fashion_bytes", lambda: b"pixels")
    monkeypatch.setattr(embed, "gloss_bytes", lambda: b"words")
    embed.main(["--out", str(tmp_path)])
    assert (tmp_path / FASHION_SLICE).read_bytes() == b"pixels"
    assert (tmp_path / GLOSS_SLICE).read_bytes() == b"words"
    assert "6 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "holder"), [(FASHION_SLICE, "Zalando"), (GLOSS_SLICE, "Princeton University")])
def test_each_slice_has_its_licence_beside_it(name: str, holder: str) -> None:
    notice = (ASSETS / f"{name.split('.')[0]}.LICENSE.txt").read_text(encoding="utf-8")
    assert notice.startswith(name)
    assert holder in notice

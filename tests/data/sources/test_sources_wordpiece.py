"""Texts in MiniLM's word pieces, against a plain search for the longest piece, and what happens without the package."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.locations import PLACES
from data.sources import load_source
from data.sources.memory import TokenSource
from data.sources.text import gloss_slice, words_of
from predictor.errors import FileFault
from tests.data.sources.test_sources_text import write_foods

missing = PLACES["minilm"].find() is None or importlib.util.find_spec("transformers") is None
needs_minilm = pytest.mark.skipif(missing, reason="python -m data prepare --install; pip install transformers")
CLS, SEP = 101, 102


@pytest.fixture(scope="module")
def glosses() -> TokenSource:
    source = load_source("glosses@minilm")
    assert isinstance(source, TokenSource)
    return source


def plain_pieces(word: str, vocabulary: set[str]) -> list[str]:
    """The longest piece that the word begins with, then the longest that the rest does, and so on."""
    pieces: list[str] = []
    while word:
        mark = "##" if pieces else ""
        length = next(n for n in range(len(word), 0, -1) if mark + word[:n] in vocabulary)
        pieces.append(mark + word[:length])
        word = word[length:]
    return pieces


@needs_minilm
def test_the_glosses_are_those_of_the_other_source(glosses: TokenSource) -> None:
    plain = load_source("glosses")
    assert (glosses.shape, glosses.classes, glosses.kind) == ((32,), 10, "text")
    assert glosses.vocabulary == len(glosses.words) == 30522
    assert glosses.words[0] == "[PAD]"
    for split in ("train", "test"):
        assert torch.equal(glosses.labels(split), plain.labels(split))


@needs_minilm
def test_every_text_lies_between_its_marks_and_padding_is_at_the_end(glosses: TokenSource) -> None:
    tokens_NT = torch.cat([samples.inputs for samples in glosses.samples.values()])
    lengths_N = (tokens_NT != 0).sum(dim=1)
    assert bool((tokens_NT[:, 0] == CLS).all())
    assert bool((tokens_NT.gather(1, lengths_N[:, None] - 1) == SEP).all())
    assert torch.equal((tokens_NT == SEP).sum(dim=1), torch.ones_like(lengths_N))
    assert torch.equal(tokens_NT != 0, torch.arange(32) < lengths_N[:, None])
    assert int(lengths_N.max()) == 32  # some are cut


@needs_minilm
def test_pieces_are_the_longest_that_fit(glosses: TokenSource) -> None:
    vocabulary = set(glosses.words)
    checked, split_words = 0, 0
    for (_, text), row_T in zip(gloss_slice()[1], glosses.samples["test"].inputs, strict=True):
        if "'" in text or " ".join(words_of(text)) != text:  # punctuation is the tokenizer's own affair
            continue
        expected = [piece for word in text.split() for piece in plain_pieces(word, vocabulary)][:30]
        assert [glosses.words[token] for token in row_T[row_T != 0].tolist()] == ["[CLS]", *expected, "[SEP]"]
        checked += 1
        split_words += any(piece.startswith("##") for piece in expected)
    assert checked > 100
    assert split_words > 20


@needs_minilm
def test_foods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    write_foods(tmp_path / "modeldata", "zlib")
    source = load_source("foods@minilm")
    assert (source.name, source.shape, source.classes, source.vocabulary) == ("foods@minilm", (96,), 2, 30522)
    assert (source.size("train"), source.size("test")) == (2, 1)
    _, tokens_BT, _ = next(source.batches("test", 1, shuffle=False))
    assert [source.words[token] for token in tokens_BT[0, :4].tolist()] == ["[CLS]", "good", "[SEP]", "[PAD]"]


def test_without_the_weights_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLACES, "minilm", replace(PLACES["minilm"], folders=("root:nowhere",)))
    with pytest.raises(
        FileFault, match=r"minilm .* is not on this machine; to get it: .*python -m data prepare --inst"
    ):
        load_source("glosses@minilm")


def place_minilm(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for name in PLACES["minilm"].files:
        (folder / name).write_text(words)
    monkeypatch.setitem(PLACES, "minilm", replace(PLACES["minilm"], folders=(str(folder),)))


def test_without_transformers_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_minilm(tmp_path, monkeypatch, "")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FileFault, match=r"vocab.txt is read with transformers, which is missing: pip install transfo"):
        load_source("glosses@minilm")


@needs_minilm
def test_another_file_is_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_minilm(tmp_path, monkeypatch, "the\nof\n[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(
        FileFault, match=r"vocab.txt: no vocabulary that begins with \[PAD\]; install the package again"
    ):
        load_source("glosses@minilm")

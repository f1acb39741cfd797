"""Words and word pieces to tokens, and the files of WordNet, on small files of the real format."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.locations import LOCATIONS, folder_of
from data.sources import load_source
from data.sources.memory import TokenSource
from data.sources.text import read_glosses, split_texts, token_source, words_of
from predictor.errors import FileFault


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    return tmp_path


def test_words_are_lower_case_and_without_punctuation() -> None:
    assert words_of("It's 3 o'clock -- (really)!\tNO.") == ["it's", "3", "o'clock", "really", "no"]


def test_tokens_by_hand() -> None:
    train = [("b", "red red blue"), ("a", "blue green red one two"), ("b", "...")]
    source = token_source("toy", train, [("a", "blue unheard red")], length=4)
    assert source.words == ("<padding>", "<unknown>", "red", "blue")  # by number, then alphabet; once is not enough
    assert source.vocabulary == 4
    _, tokens_BT, labels_B = next(source.batches("train", 3, shuffle=False))
    # cut after four words, padded with 0; a text without a word is one unknown word, never padding alone
    assert tokens_BT.tolist() == [[2, 2, 3, 0], [3, 1, 2, 1], [1, 0, 0, 0]]
    assert labels_B.tolist() == [1, 0, 1]  # classes in alphabetical order
    _, tokens_BT, labels_B = next(source.batches("test", 1, shuffle=False))
    assert (tokens_BT.tolist(), labels_B.tolist()) == ([[3, 1, 2, 0]], [0])


def test_the_vocabulary_knows_nothing_of_the_test_split_and_has_a_limit() -> None:
    train = [("a", "one one two two three three"), ("b", "one two")]
    words = token_source("toy", train, [("a", "four four four")], 4).words
    assert words[2:] == ("one", "two", "three")
    assert token_source("toy", train, train, 4, limit=4).words[2:] == ("one", "two")


def test_the_embedded_glosses() -> None:
    source = load_source("glosses")
    assert (source.shape, source.classes, source.size("train"), source.size("test")) == ((32,), 10, 6000, 2000)
    assert source.labels("train").bincount().tolist() == [600] * 10
    assert source.labels("test").bincount().tolist() == [200] * 10
    tokens = source.samples["train"].inputs
    assert int(tokens.max()) == source.vocabulary - 1
    assert bool((tokens[:, 0] > 0).all())


LICENCE = "  1 This software and database is being provided to you  \n"


def write_wordnet(folder: Path) -> None:
    folder.mkdir()
    noun = "".join(f'{n:08} {n % 2 + 3:02} n 01 thing 0 000 | noun gloss {n}; "an example"  \n' for n in range(20))
    repeated = '00000099 05 n 01 again 0 000 | noun gloss 1; "of another class"  \n'
    (folder / "data.noun").write_text(LICENCE + noun + repeated)
    for part, number in (("verb", 29), ("adj", 0), ("adv", 2)):
        rows = "".join(f"{n:08} {number:02} v 01 do 0 000 | {part} {n}; with a semicolon  \n" for n in range(10))
        (folder / f"data.{part}").write_text(LICENCE + rows)


def test_wordnets_files(root: Path) -> None:
    write_wordnet(root / "wordnet")
    texts = read_glosses(root / "wordnet", ["noun", "verb"])
    assert texts[:2] == [("03", "noun gloss 0"), ("04", "noun gloss 1")]
    assert len(texts) == 30  # of equal glosses the first alone
    assert texts[20] == ("29", "verb 0; with a semicolon")
    source = load_source("glosses-full")
    assert (source.classes, source.size("train"), source.size("test")) == (5, 45, 5)
    assert source.labels("test").bincount().tolist() == [1] * 5
    (root / "wordnet" / "data.verb").write_bytes(b"\xff\xfe")
    with pytest.raises(FileFault, match=r"data.verb: no WordNet data file"):
        load_source("glosses-full")
    (root / "wordnet" / "data.verb").write_text("nonsense\n")
    with pytest.raises(FileFault, match=r"data.verb: no WordNet data file"):
        load_source("glosses-full")


def test_split_texts_keeps_all_texts_once() -> None:
    texts = [("ab"[number % 2], str(number)) for number in range(20)]
    train, test = split_texts(texts, 14)
    assert sorted(train + test) == sorted(texts)
    assert [label for label, _ in train].count("a") == 7


@pytest.mark.skipif(LOCATIONS["glosses-full"].find() is None, reason="Debian's wordnet-base is not installed")
def test_the_real_glosses() -> None:
    texts = read_glosses(folder_of("glosses-full"), ["noun", "verb", "adj", "adv"])
    assert len(texts) == 116_697
    assert {label for label, _ in texts} == {f"{number:02}" for number in range(45)}


missing = LOCATIONS["minilm"].find() is None or importlib.util.find_spec("transformers") is None
needs_minilm = pytest.mark.skipif(missing, reason="python -m data prepare --install; pip install transformers")
CLS, SEP = 101, 102


@pytest.fixture(scope="module")
def glosses() -> TokenSource:
    source = load_source("glosses@minilm")
    assert isinstance(source, TokenSource)
    return source


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


def test_without_the_weights_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOCATIONS, "minilm", replace(LOCATIONS["minilm"], folders=("root:nowhere",)))
    with pytest.raises(
        FileFault, match=r"minilm .* is not on this machine; to get it: .*python -m data prepare --inst"
    ):
        load_source("glosses@minilm")


def install_minilm(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for name in LOCATIONS["minilm"].files:
        (folder / name).write_text(words)
    monkeypatch.setitem(LOCATIONS, "minilm", replace(LOCATIONS["minilm"], folders=(str(folder),)))


def test_without_transformers_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_minilm(tmp_path, monkeypatch, "")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FileFault, match=r"vocab.txt is read with transformers, which is missing: pip install transfo"):
        load_source("glosses@minilm")


@needs_minilm
def test_another_file_is_no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_minilm(tmp_path, monkeypatch, "the\nof\n[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(FileFault, match=r"vocab.txt: no vocabulary that begins with \[PAD\]; get the file again"):
        load_source("glosses@minilm")

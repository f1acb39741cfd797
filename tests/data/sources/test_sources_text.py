"""Words to tokens, WordNet's files, and R's data base of fine foods, on small files of the real formats."""

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from data.locations import PLACES, folder_of
from data.sources import load_source
from data.sources.rdata import read_data_frame
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
    texts = [("ab"[place % 2], str(place)) for place in range(20)]
    train, test = split_texts(texts, 14)
    assert sorted(train + test) == sorted(texts)
    assert [label for label, _ in train].count("a") == 7


def text(value: str) -> bytes:
    return struct.pack(">ii", 9 | 8 << 12, len(value.encode())) + value.encode()


class RWriter:
    """R's serialization, version 3, of the little that a data frame needs."""

    def __init__(self) -> None:
        self.symbols: list[str] = []

    def file(self, item: bytes) -> bytes:
        return b"X\n" + struct.pack(">iiii", 3, 0x40202, 0x30500, 5) + b"UTF-8" + item

    def symbol(self, name: str) -> bytes:
        if name in self.symbols:  # said before: a reference
            return struct.pack(">i", (self.symbols.index(name) + 1) << 8 | 255)
        self.symbols.append(name)
        return struct.pack(">i", 1) + text(name)

    def vector(self, kind: int, content: list[bytes], **attributes: Callable[[], bytes]) -> bytes:
        out = struct.pack(">ii", kind | (512 if attributes else 0), len(content)) + b"".join(content)
        for name, item in attributes.items():
            out += struct.pack(">i", 2 | 1024) + self.symbol(name) + item()
        return out + (struct.pack(">i", 254) if attributes else b"")

    def strings(self, *values: str) -> bytes:
        return self.vector(16, [text(value) for value in values])

    def integers(self, *values: int, **attributes: Callable[[], bytes]) -> bytes:
        return self.vector(13, [struct.pack(">i", value) for value in values], **attributes)

    def named(self, items: dict[str, bytes], **attributes: Callable[[], bytes]) -> bytes:
        return self.vector(19, [*items.values()], names=lambda: self.strings(*items), **attributes)

    def frame(self, reviews: list[str], scores: list[int]) -> bytes:
        items = {
            "product": self.strings(*["B000"] * len(reviews)),
            "review": self.strings(*reviews),
            "score": self.integers(*scores, levels=lambda: self.strings("great", "other")),
        }
        return self.named(items, levels=lambda: self.strings("unused"))


def lzma_raw(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "lzma": lambda content: b"Z" + lzma_raw(content),
    "bzip2": lambda content: b"2" + bz2.compress(content),
    "zlib": zlib.compress,
}


def write_foods(folder: Path, kind: str) -> None:
    folder.mkdir()
    writer = RWriter()
    train = writer.file(writer.frame(["good good food", "bad bad food é"], [1, 2]))
    writer = RWriter()
    test = writer.file(writer.frame(["good"], [1]))
    base, places = b"", {}
    for name, content in (("training_data", train), ("testing_data", test)):
        chunk = struct.pack(">i", len(content)) + PACKED[kind](content)
        places[name] = len(base), len(chunk)
        base += chunk
    writer = RWriter()
    variables = writer.named({name: writer.integers(*place) for name, place in places.items()})
    (folder / "Rdata.rdb").write_bytes(base)
    (folder / "Rdata.rdx").write_bytes(gzip.compress(writer.file(writer.named({"variables": variables}))))


@pytest.mark.parametrize("kind", PACKED)
def test_foods_from_rs_data_base(root: Path, kind: str) -> None:
    write_foods(root / "modeldata", kind)
    frame = read_data_frame(root / "modeldata", "training_data")
    assert frame["review"] == ["good good food", "bad bad food é"]
    assert frame["score"] == ["great", "other"]
    source = load_source("foods")
    assert (source.classes, source.shape, source.size("train"), source.size("test")) == (2, (96,), 2, 1)
    assert source.words[2:] == ("bad", "food", "good")
    assert source.labels("train").tolist() == [0, 1]


def test_a_broken_data_base_of_r_is_named(root: Path) -> None:
    folder = root / "modeldata"
    write_foods(folder, "lzma")
    with pytest.raises(FileFault, match="nobody cannot be read"):
        read_data_frame(folder, "nobody")
    for name in ("Rdata.rdb", "Rdata.rdx"):
        whole = (folder / name).read_bytes()
        for broken in (b"", whole[: len(whole) // 3], whole[:20] + bytes(60) + whole[80:]):
            (folder / name).write_bytes(broken)
            with pytest.raises(FileFault, match=r"training_data cannot be read.*install the package again"):
                read_data_frame(folder, "training_data")
        (folder / name).write_bytes(whole)


@pytest.mark.skipif(PLACES["foods"].find() is None, reason="Debian's r-cran-modeldata is not installed")
def test_the_real_foods() -> None:
    source = load_source("foods")
    assert (source.size("train"), source.size("test")) == (4000, 1000)
    assert source.labels("train").bincount().tolist() == [2600, 1400]
    assert source.labels("test").bincount().tolist() == [658, 342]


@pytest.mark.skipif(PLACES["glosses-full"].find() is None, reason="Debian's wordnet-base is not installed")
def test_the_real_glosses() -> None:
    texts = read_glosses(folder_of("glosses-full"), ["noun", "verb", "adj", "adv"])
    assert len(texts) == 116_697
    assert {label for label, _ in texts} == {f"{number:02}" for number in range(45)}

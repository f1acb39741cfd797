"""GLUE's tasks, on small files of their format: columns, headings, quotation marks, and what is no such file."""

from pathlib import Path

import pytest

from data.sources import load_source
from data.sources.memory import TokenSource
from data.sources.text import GLUE, read_glue
from predictor.errors import FileFault
from tests.collect.users_disk import WORDS, write_bert, write_glue


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "length", "first"),
    [
        ("mrpc", 128, '[CLS] the " cat sat . [SEP] a dog ran . [SEP]'),
        ("cola", 64, "[CLS] the cat sat on a mat . [SEP]"),
        ("sst2", 64, "[CLS] the cat ran [SEP]"),
    ],
)
def test_a_task_in_word_pieces(task: str, length: int, first: str, disk: Path) -> None:
    pytest.importorskip("transformers", reason="an optional extra")
    write_glue(disk)
    write_bert(disk)
    source = load_source(f"{task}@bert-base")
    assert isinstance(source, TokenSource)
    assert (source.name, source.classes, source.shape) == (f"{task}@bert-base", 2, (length,))
    assert source.words == WORDS
    assert source.size("train") == source.size("test") == 8
    assert source.labels("test").tolist() == [0, 1] * 4
    tokens_T = source.samples["train"].inputs[0]
    assert [WORDS[token] for token in tokens_T.tolist() if token] == first.split()


@pytest.mark.parametrize("text", ["", "Quality\n", "Quality\n1\tone\ttwo\n", "Quality\n2\t1\t2\ta\tb\n", "Quality\n\n"])
def test_what_is_no_file_of_the_task(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(text)
    with pytest.raises(FileFault, match=r"train\.tsv: (empty|line 2 has no class 0 or 1 in column 1 .* get GLUE's)"):
        read_glue(path, GLUE["mrpc"])


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(FileFault, match=r"train\.tsv: cannot be read"):
        read_glue(tmp_path / "train.tsv", GLUE["cola"])


def test_a_missing_task_is_named_with_its_cure(disk: Path) -> None:
    with pytest.raises(FileFault, match=rf"glue-cola .* is not on this machine; to get it: .*CoLA\.zip -d {disk}/glue"):
        load_source("cola@bert-base")

"""WordNet glosses and tasks of GLUE as token sequences of one length: words, or word pieces of a BERT."""

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from data.locations import ASSETS, folder_of
from data.sources.base import stratified
from data.sources.memory import Samples, TokenSource
from predictor.errors import FileFault

Texts: TypeAlias = list[tuple[str, str]]
"""(class, text) of each sample."""

GLOSS_SLICE = "glosses-slice.tsv.gz"
PADDING, UNKNOWN = 0, 1
GLOSS_LENGTH = 32
SEPARATOR = "[SEP]"
"""The word piece behind each text of a sample."""
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def glosses() -> TokenSource:
    """The embedded slice of WordNet: 6,000 + 2,000 glosses of nouns, 10 classes, equally many of each."""
    return token_source("glosses", *gloss_slice(), GLOSS_LENGTH)


def glosses_full() -> TokenSource:
    """All glosses of WordNet, split nine to one: 45 lexicographer classes."""
    texts = read_glosses(folder_of("glosses-full"), ("noun", "verb", "adj", "adv"))
    train, test = split_texts(texts, len(texts) * 9 // 10)
    return token_source("glosses-full", train, test, GLOSS_LENGTH)


def glosses_minilm() -> TokenSource:
    """The embedded slice of WordNet in MiniLM's word pieces: 6,000 + 2,000 glosses, 10 classes."""
    train, test = gloss_slice()
    tokens_NT, pieces = _word_pieces("minilm", [[text for _, text in train + test]], GLOSS_LENGTH)
    return _source("glosses@minilm", tokens_NT, labels_of(train + test), len(train), pieces)


@dataclass(frozen=True)
class GlueTask:
    """How GLUE's train.tsv and dev.tsv of a task are read. The labels of its test.tsv are not published."""

    label: int
    """The column of the class."""
    texts: tuple[int, ...]
    """The columns of the texts: one, or the two of a pair."""
    heading: bool
    """Whether the first line names the columns."""
    length: int
    """Word pieces of a sample. Longer ones are cut."""


GLUE = {
    "mrpc": GlueTask(label=0, texts=(3, 4), heading=True, length=128),
    "cola": GlueTask(label=1, texts=(3,), heading=False, length=64),
    "sst2": GlueTask(label=1, texts=(0,), heading=True, length=64),
}
"""Tasks of GLUE (Wang et al., 2019) with two classes."""


def glue(name: str) -> TokenSource:
    """A task of GLUE from the user's disk in the word pieces of BERT-base; the test split is GLUE's dev.tsv."""
    task, folder = GLUE[name], folder_of(f"glue-{name}")
    train, test = (read_glue(folder / f"{part}.tsv", task) for part in ("train", "dev"))
    rows = train + test
    columns = [[row[index] for row in rows] for index in range(1, len(rows[0]))]
    tokens_NT, pieces = _word_pieces("bert-base", columns, task.length)
    return _source(f"{name}@bert-base", tokens_NT, torch.tensor([int(row[0]) for row in rows]), len(train), pieces)


def read_glue(path: Path, task: GlueTask) -> list[list[str]]:
    """The class, "0" or "1", and the texts of each line. Quotation marks in it are part of the text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFault(f"{path}: cannot be read ({error}); get it again") from error
    rows = []
    for number, line in enumerate(lines[task.heading :], 1 + task.heading):
        fields = line.split("\t")
        if len(fields) <= max(task.label, *task.texts) or fields[task.label] not in ("0", "1"):
            raise FileFault(
                f"{path}: line {number} has no class 0 or 1 in column {task.label + 1} and text in column "
                f"{' and '.join(str(column + 1) for column in task.texts)}: get GLUE's file, tab-separated"
            )
        rows.append([fields[column] for column in (task.label, *task.texts)])
    if not rows:
        raise FileFault(f"{path}: empty; get it again")
    return rows


def gloss_slice() -> tuple[Texts, Texts]:
    """The embedded glosses for training and for testing."""
    splits: dict[str, Texts] = {"train": [], "test": []}
    with gzip.open(ASSETS / GLOSS_SLICE, "rt", encoding="utf-8") as lines:
        for line in lines:
            split, label, text = line.rstrip("\n").split("\t")
            splits[split].append((label, text))
    return splits["train"], splits["test"]


def read_glosses(folder: Path, parts: Sequence[str]) -> Texts:
    """(lexicographer class, gloss without its examples) of every synset. Of equal glosses only the first counts."""
    found: dict[str, str] = {}
    for part in parts:
        path = folder / f"data.{part}"
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.startswith("  "):  # the licence is in lines that do
                    fields, _, gloss = line.partition(" | ")
                    found.setdefault(gloss.partition('; "')[0].strip(), fields.split(" ", 2)[1])
        except (OSError, UnicodeDecodeError, IndexError) as error:
            raise FileFault(f"{path}: no WordNet data file ({error}); install it again") from error
    return [(label, gloss) for gloss, label in found.items()]


def split_texts(texts: Texts, train_samples: int) -> tuple[Texts, Texts]:
    """A training and a test split, with each class in proportion. Always the same ones."""
    chosen = set(stratified(labels_of(texts), train_samples).tolist())
    return [texts[index] for index in sorted(chosen)], [row for index, row in enumerate(texts) if index not in chosen]


def token_source(name: str, train: Texts, test: Texts, length: int, limit: int = 8000) -> TokenSource:
    """A source of texts. The vocabulary is the words that occur twice or more in `train`, at most `limit`."""
    texts = [words_of(text) for _, text in train + test]
    words = ("<padding>", "<unknown>", *_vocabulary(texts[: len(train)], limit - 2))
    return _source(name, _tokens(texts, words, length), labels_of(train + test), len(train), words)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def labels_of(texts: Texts) -> Tensor:
    """labels_N: the index of the class of each text, with classes in alphabetical order."""
    names = sorted({label for label, _ in texts})
    index_of = {name: index for index, name in enumerate(names)}
    return torch.tensor([index_of[label] for label, _ in texts])


def _source(name: str, tokens_NT: Tensor, labels_N: Tensor, train_samples: int, words: tuple[str, ...]) -> TokenSource:
    train, test = (
        Samples(tokens_NT[part], labels_N[part]) for part in (slice(train_samples), slice(train_samples, None))
    )
    return TokenSource(name, int(labels_N.max()) + 1, train, test, words)


def _vocabulary(texts: list[list[str]], limit: int) -> list[str]:
    counts = Counter(word for text in texts for word in text)
    common = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
    return [word for word in common if counts[word] > 1]


def _tokens(texts: list[list[str]], words: Sequence[str], length: int) -> Tensor:
    """tokens_NT, cut or padded to `length`. A text without words is one unknown word, since attention needs one."""
    index_of = {word: index for index, word in enumerate(words)}
    cut = [text[:length] or [words[UNKNOWN]] for text in texts]
    lengths_N = torch.tensor([len(text) for text in cut])
    tokens_NT = torch.full((len(cut), length), PADDING)
    tokens = torch.tensor([index_of.get(word, UNKNOWN) for text in cut for word in text])
    tokens_NT[torch.arange(length) < lengths_N[:, None]] = tokens
    return tokens_NT


def _word_pieces(location: str, texts: Sequence[list[str]], length: int) -> tuple[Tensor, tuple[str, ...]]:
    """tokens_NT and the vocabulary in the order of tokens. [CLS] is first, and [SEP] behind each text of a sample.

    Args:
        location: The name in LOCATIONS of the network whose vocabulary it is.
        texts: The texts of all samples; for pairs a second list with the other texts.
        length: Word pieces of a sample, cut or padded with 0.
    """
    path = folder_of(location) / "vocab.txt"
    try:
        from transformers import BertTokenizerFast
    except ModuleNotFoundError as error:
        raise FileFault(f"{path} is read with transformers, which is missing: pip install transformers") from error
    # From the vocabulary file itself: nothing in it can refer to the hub.
    tokenizer = BertTokenizerFast(str(path))
    numbers: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token_id != 0 or sorted(numbers.values()) != list(range(len(numbers))):
        raise FileFault(f"{path}: no vocabulary that begins with [PAD]; get the file again")
    rows = tokenizer(*texts, truncation=True, max_length=length, padding="max_length")["input_ids"]
    return torch.tensor(rows), tuple(sorted(numbers, key=numbers.__getitem__))

"""Text data sets: WordNet glosses and fine-food reviews, as word tokens of one length."""

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from data.locations import ASSETS, folder_of
from data.sources.base import stratified
from data.sources.memory import Samples, TokenSource
from data.sources.rdata import read_data_frame
from predictor.errors import FileFault

Texts: TypeAlias = list[tuple[str, str]]
"""(class, text) of each sample."""

GLOSS_SLICE = "glosses-slice.tsv.gz"
PADDING, UNKNOWN = 0, 1
GLOSS_LENGTH, FOODS_LENGTH = 32, 96
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def glosses() -> TokenSource:
    """The embedded slice of WordNet: 6,000 + 2,000 glosses of nouns, 10 classes, equally many of each."""
    return token_source("glosses", *gloss_slice(), GLOSS_LENGTH)


def glosses_full() -> TokenSource:
    """All of WordNet's glosses, split here nine to one: its 45 lexicographer classes."""
    texts = read_glosses(folder_of("glosses-full"), ("noun", "verb", "adj", "adv"))
    train, test = split_texts(texts, len(texts) * 9 // 10)
    return token_source("glosses-full", train, test, GLOSS_LENGTH)


def foods() -> TokenSource:
    """Amazon fine foods: 4,000 + 1,000 reviews, 2 classes (great or not; 65 % are)."""
    return token_source("foods", *food_reviews(), FOODS_LENGTH)


def gloss_slice() -> tuple[Texts, Texts]:
    """The embedded glosses for training and for testing."""
    splits: dict[str, Texts] = {"train": [], "test": []}
    with gzip.open(ASSETS / GLOSS_SLICE, "rt", encoding="utf-8") as lines:
        for line in lines:
            split, label, text = line.rstrip("\n").split("\t")
            splits[split].append((label, text))
    return splits["train"], splits["test"]


def food_reviews() -> tuple[Texts, Texts]:
    """The reviews for training and for testing. Raises FileFault with the cure where they are not on the disk."""
    folder = folder_of("foods")
    train, test = (read_data_frame(folder, f"{split}_data") for split in ("training", "testing"))
    texts = [list(zip(frame["score"], frame["review"], strict=True)) for frame in (train, test)]
    return texts[0], texts[1]


def read_glosses(folder: Path, parts: Sequence[str]) -> Texts:
    """(lexicographer class, gloss without its examples) of every synset; of equal glosses the first alone counts."""
    found: dict[str, str] = {}
    for part in parts:
        path = folder / f"data.{part}"
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.startswith("  "):  # the licence stands in lines that do
                    fields, _, gloss = line.partition(" | ")
                    found.setdefault(gloss.partition('; "')[0].strip(), fields.split(" ", 2)[1])
        except (OSError, UnicodeDecodeError, IndexError) as error:
            raise FileFault(f"{path}: no WordNet data file ({error}); install it again") from error
    return [(label, gloss) for gloss, label in found.items()]


def split_texts(texts: Texts, train_samples: int) -> tuple[Texts, Texts]:
    """A training and a test split, each class with its share in both, always the same ones."""
    chosen = set(stratified(labels_of(texts), train_samples).tolist())
    return [texts[place] for place in sorted(chosen)], [row for place, row in enumerate(texts) if place not in chosen]


def token_source(name: str, train: Texts, test: Texts, length: int, limit: int = 8000) -> TokenSource:
    """A source out of texts. The vocabulary holds the words that occur twice or more in `train`, at most `limit`."""
    texts = [words_of(text) for _, text in train + test]
    words = ("<padding>", "<unknown>", *_vocabulary(texts[: len(train)], limit - 2))
    tokens_NT, labels_N = _tokens(texts, words, length), labels_of(train + test)
    parts = [Samples(tokens_NT[part], labels_N[part]) for part in (slice(len(train)), slice(len(train), None))]
    return TokenSource(name, int(labels_N.max()) + 1, parts[0], parts[1], words)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def _vocabulary(texts: list[list[str]], limit: int) -> list[str]:
    counts = Counter(word for text in texts for word in text)
    common = sorted(counts, key=lambda word: (-counts[word], word))[:limit]
    return [word for word in common if counts[word] > 1]


def _tokens(texts: list[list[str]], words: Sequence[str], length: int) -> Tensor:
    """tokens_NT: cut or padded to `length`. A text without a word is one unknown word: attention needs one at least."""
    number = {word: place for place, word in enumerate(words)}
    cut = [text[:length] or [words[UNKNOWN]] for text in texts]
    lengths_N = torch.tensor([len(text) for text in cut])
    tokens_NT = torch.full((len(cut), length), PADDING)
    tokens = torch.tensor([number.get(word, UNKNOWN) for text in cut for word in text])
    tokens_NT[torch.arange(length) < lengths_N[:, None]] = tokens
    return tokens_NT


def labels_of(texts: Texts) -> Tensor:
    """labels_N: the place of each text's class among all classes in alphabetical order."""
    names = sorted({label for label, _ in texts})
    number = {name: place for place, name in enumerate(names)}
    return torch.tensor([number[label] for label, _ in texts])

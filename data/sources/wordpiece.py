"""The text data sets as word pieces of a pretrained network, whose vocabulary lies beside its weights."""

import torch
from torch import Tensor

from data.locations import folder_of
from data.sources.memory import Samples, TokenSource
from data.sources.text import FOODS_LENGTH, GLOSS_LENGTH, Texts, food_reviews, gloss_slice, labels_of
from predictor.errors import FileFault


def glosses_minilm() -> TokenSource:
    """The embedded slice of WordNet in MiniLM's word pieces: 6,000 + 2,000 glosses, 10 classes."""
    return _word_piece_source("glosses@minilm", *gloss_slice(), GLOSS_LENGTH)


def foods_minilm() -> TokenSource:
    """Amazon fine foods in MiniLM's word pieces: 4,000 + 1,000 reviews, 2 classes."""
    return _word_piece_source("foods@minilm", *food_reviews(), FOODS_LENGTH)


def _word_piece_source(name: str, train: Texts, test: Texts, length: int) -> TokenSource:
    """A source out of texts, each between [CLS] and [SEP], cut or padded with 0 to `length` tokens."""
    tokens_NT, pieces = _word_pieces([text for _, text in train + test], length)
    labels_N = labels_of(train + test)
    parts = [Samples(tokens_NT[part], labels_N[part]) for part in (slice(len(train)), slice(len(train), None))]
    return TokenSource(name, int(labels_N.max()) + 1, parts[0], parts[1], pieces)


def _word_pieces(texts: list[str], length: int) -> tuple[Tensor, tuple[str, ...]]:
    """tokens_NT and the vocabulary in the order of its numbers."""
    path = folder_of("minilm") / "vocab.txt"
    try:
        from transformers import BertTokenizerFast
    except ModuleNotFoundError as error:
        raise FileFault(f"{path} is read with transformers, which is missing: pip install transformers") from error
    # From the vocabulary's file itself, in which nothing can refer to the hub.
    tokenizer = BertTokenizerFast(str(path))
    numbers: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token_id != 0 or sorted(numbers.values()) != list(range(len(numbers))):
        raise FileFault(f"{path}: no vocabulary that begins with [PAD]; install the package again")
    rows = tokenizer(texts, truncation=True, max_length=length, padding="max_length")["input_ids"]
    return torch.tensor(rows), tuple(sorted(numbers, key=numbers.__getitem__))

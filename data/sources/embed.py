"""Makes the slices in data/assets from the whole data sets: run `python -m data.sources.embed`.

It needs `dataset-fashion-mnist` and `wordnet-base` (see `python -m data prepare`). The content is always the same.
"""

import argparse
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.locations import ASSETS, folder_of
from data.sources.base import balanced, stratified
from data.sources.images import FASHION_SLICE, fashion_full
from data.sources.text import GLOSS_SLICE, labels_of, read_glosses, split_texts
from predictor.shared import flags as cli
from predictor.shared.files import written_whole

NOUN_CLASSES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "07": "attribute",
    "10": "communication",
    "15": "location",
    "18": "person",
    "20": "plant",
    "26": "state",
    "27": "substance",
}
"""The ten most common lexicographer classes of nouns: the number in the files of WordNet, and the name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write both slices."""
    parser = argparse.ArgumentParser(prog="python -m data.sources.embed", description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="FOLDER", help="where to (default: %(default)s)")
    out = parser.parse_args(argv).out
    for path, content in ((out / FASHION_SLICE, fashion_bytes()), (out / GLOSS_SLICE, gloss_bytes())):
        with written_whole(path) as part:
            part.write_bytes(content)
        print(f"{path}: {len(content):,} bytes")


def fashion_bytes(train_samples: int = 10_000, test_samples: int = 2_000) -> bytes:
    """A compressed npz of uint8: train_images (N, 28, 28), train_labels (N,), and the same for test."""
    parts = zip(fashion_full().samples.values(), (train_samples, test_samples), strict=True)
    train, test = (part.at(stratified(part.labels, samples)) for part, samples in parts)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        train_images=train.inputs[:, 0].numpy(),
        train_labels=train.labels.numpy().astype(np.uint8),
        test_images=test.inputs[:, 0].numpy(),
        test_labels=test.labels.numpy().astype(np.uint8),
    )
    return buffer.getvalue()


def gloss_bytes(train_samples: int = 6_000, test_samples: int = 2_000) -> bytes:
    """Gzipped lines of split, class and gloss, tab-separated. Equally many glosses of each class."""
    texts = [
        (NOUN_CLASSES[label], text)
        for label, text in read_glosses(folder_of("glosses-full"), ["noun"])
        if label in NOUN_CLASSES
    ]
    chosen = [texts[index] for index in balanced(labels_of(texts), train_samples + test_samples).tolist()]
    rows = zip(("train", "test"), split_texts(chosen, train_samples), strict=True)
    lines = [f"{split}\t{label}\t{text}\n" for split, part in rows for label, text in part]
    return gzip.compress("".join(lines).encode(), mtime=0)


if __name__ == "__main__":
    cli.run(main)

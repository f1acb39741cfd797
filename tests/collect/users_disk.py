"""Small files in the formats of the data sets and weights that users have on their disk."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", '"', ".")
GLUE_FILES = {
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    + "".join(f'{label}\t1\t2\tthe "cat sat .\ta dog ran{" on a mat" * label} .\r\n' for label in (0, 1) * 4),
    "CoLA": "".join(f"gj04\t{label}\t{'' if label else '*'}\tthe cat sat on a mat .\n" for label in (0, 1) * 4),
    "SST-2": "sentence\tlabel\n" + "".join(f"the {'dog' * label or 'cat'} ran \t{label}\n" for label in (0, 1) * 4),
}
"""What a file of each task holds: eight lines, four of each class."""


def write_cifar(root: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch, images: int = 4) -> None:
    """CIFAR with so many images a file, and the checksums that torchvision compares. dataset: torchvision's class."""
    folder = root / dataset.base_folder
    key = "fine_labels" if dataset.__name__ == "CIFAR100" else "labels"
    folder.mkdir()
    for split in ("train_list", "test_list"):
        checksums = []
        for name, _ in getattr(dataset, split):
            pixels = np.random.default_rng(0).integers(0, 256, (images, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels, key: [number % 4 for number in range(images)]}, protocol=2)
            (folder / name).write_bytes(content)
            checksums.append([name, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(dataset, split, checksums)
    content = pickle.dumps({dataset.meta["key"]: [f"class {label}" for label in range(4)]}, protocol=2)
    (folder / dataset.meta["filename"]).write_bytes(content)
    monkeypatch.setitem(dataset.meta, "md5", hashlib.md5(content).hexdigest())


def write_glue(root: Path, times: int = 1) -> None:
    """GLUE's three tasks, train.tsv and dev.tsv of each alike. times: how often the file has its lines."""
    for task, content in GLUE_FILES.items():
        folder = root / "glue" / task
        folder.mkdir(parents=True)
        for part in ("train", "dev"):
            head = "" if task == "CoLA" else content[: content.index("\n") + 1]
            (folder / f"{part}.tsv").write_bytes((head + content.removeprefix(head) * times).encode())


def write_bert(root: Path) -> dict[str, Any]:
    """A small BERT with its pretraining's heads, under the names of BERT-base's file. Returns the file's tensors."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForPreTraining

    folder = root / "bert-base-uncased"
    folder.mkdir()
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "bert"}, default=str))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    state = BertForPreTraining(config).state_dict()
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # the same tensors once more
    tensors = {key: tensor.clone() for key, tensor in state.items() if key not in tied}
    save_file(tensors, folder / "model.safetensors")
    return tensors

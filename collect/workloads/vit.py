"""Small vision transformers (Dosovitskiy et al., 2021) of DeiT's shape (Touvron et al., 2021), without distillation."""

import torch
from torch import Tensor, nn

from collect.workloads.encoder import EncoderBlock
from collect.workloads.initial import draw_weights
from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class Vit(nn.Module):
    """Patches through a linear layer, a class token, learned positions, `depth` encoder blocks, and the head.

    Args:
        source: Its images' shape, and the number of classes.
        patch: Pixels along the side of a patch.
        width: Channels of a token.
        depth: Number of blocks.
        heads: Of attention, in each block.
        spread: The standard deviation of the initial weights (`draw_weights`); None leaves PyTorch's.
    """

    def __init__(
        self, source: Source, patch: int, width: int, depth: int, heads: int, spread: float | None = None
    ) -> None:
        super().__init__()
        channels, height, across = image_shape(source)
        tokens = (height // patch) * (across // patch)
        self.class_token_11C = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions_1TC = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.02)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, source.classes)
        draw_weights(self, spread)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images x_BCHW -> logits."""
        x_BTC = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        x_BTC = torch.cat([self.class_token_11C.expand(len(x_BTC), -1, -1), x_BTC], dim=1) + self.positions_1TC
        logits: Tensor = self.head(self.norm(self.blocks(x_BTC))[:, 0])
        return logits


def vit_fashion() -> Workload:
    """Four blocks of 64 channels and 4 heads on Fashion-MNIST in patches of 4x4; about 3 minutes."""
    recipe = Recipe(epochs=12, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0)
    return Workload("vit-fashion", "vit", lambda source: Vit(source, 4, 64, 4, 4), "fashion", recipe)


def vit_digits() -> Workload:
    """Three blocks of 48 channels and 4 heads on digits in patches of 2x2; about 18 seconds."""
    recipe = Recipe(epochs=20, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0)
    return Workload("vit-digits", "vit", lambda source: Vit(source, 2, 48, 3, 4), "digits", recipe)

"""The transformer encoder block that the vision and the text models share."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """x_BTC -> the same shape. real_BT: which tokens may be looked at; all of them by default."""
        query, key, value = self.query_key_value(x_BTC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if real_BT is None else real_BT[:, None, None, :]
        mixed_BHTD = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out_BTC: Tensor = self.output(mixed_BHTD.transpose(1, 2).flatten(2))
        return out_BTC


class EncoderBlock(nn.Module):
    """Attention, then two linear layers on each token; normalized first, both residual."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """x_BTC -> the same shape. real_BT: which tokens may be looked at; all of them by default."""
        x_BTC = x_BTC + self.dropout1(self.attention(self.norm1(x_BTC), real_BT))
        out_BTC: Tensor = x_BTC + self.dropout2(self.mlp(self.norm2(x_BTC)))
        return out_BTC

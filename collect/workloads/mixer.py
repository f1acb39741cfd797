"""Small MLP-Mixers (Tolstikhin et al., 2021): linear layers over patches and over channels, in turn."""

from torch import Tensor, nn

from collect.workloads.initial import draw_weights
from collect.workloads.recipe import Recipe, Workload, image_shape
from data.sources.base import Source


class MixerBlock(nn.Module):
    """Mixes the tokens of each channel, then the channels of each token; both are residual."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(width)
        self.token_mix = nn.Sequential(nn.Linear(tokens, width // 2), nn.GELU(), nn.Linear(width // 2, tokens))
        self.channel_norm = nn.LayerNorm(width)
        self.channel_mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """x_BTC -> the same shape: batch, tokens, channels."""
        x_BTC = x_BTC + self.token_mix(self.token_norm(x_BTC).transpose(1, 2)).transpose(1, 2)
        out_BTC: Tensor = x_BTC + self.channel_mix(self.channel_norm(x_BTC))
        return out_BTC


class Mixer(nn.Module):
    """Patches through a linear layer, `depth` blocks, the mean over tokens, and the head.

    Args:
        source: Its images' shape, and the number of classes.
        patch: Pixels along the side of a patch.
        width: Channels of a token.
        depth: Number of blocks.
        spread: The standard deviation of the initial weights (`draw_weights`); None leaves PyTorch's.
    """

    def __init__(self, source: Source, patch: int, width: int, depth: int, spread: float | None = None) -> None:
        super().__init__()
        channels, height, across = image_shape(source)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        tokens = (height // patch) * (across // patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, source.classes)
        draw_weights(self, spread)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images x_BCHW -> logits."""
        x_BTC = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(x_BTC)).mean(dim=1))
        return logits


def mixer_fashion() -> Workload:
    """Four blocks of 64 channels on Fashion-MNIST in patches of 4x4; about 2.5 minutes."""
    recipe = Recipe(epochs=20, optimizer="adamw", lr=2e-3, weight_decay=0.05)
    return Workload("mixer-fashion", "mixer", lambda source: Mixer(source, 4, 64, 4), "fashion", recipe)


def mixer_digits() -> Workload:
    """Three blocks of 48 channels on digits in patches of 2x2; about 12 seconds."""
    recipe = Recipe(epochs=20, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05)
    return Workload("mixer-digits", "mixer", lambda source: Mixer(source, 2, 48, 3), "digits", recipe)

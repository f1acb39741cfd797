"""The freeze predictor: attention over a window of one layer's snapshots, the newest asking the older ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.errors import UsageError
from predictor.model.features import CLOCK, SIGNALS, rms
from predictor.model.sampling import thinned

_EPS = 1e-8
MOTION = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", "evenness")


@dataclass(frozen=True)
class PredictorConfig:
    """The form of a predictor."""

    inputs: Literal["gain", "motion", "raw"] = "gain"
    """What it sees of a snapshot: scale-free statistics of how the weights moved, with all signals ("gain") or those of
    the clock alone ("motion"); or the raw weights, as in the paper."""
    window: int = 10
    """Snapshots in a window (W)."""
    weights: int = 256
    """Sampled weights it looks at (K); at most as many as were recorded."""
    hidden: int = 64
    """Width of the hidden layers of the K, Q and V networks."""
    key: int = 32
    """Width of keys, queries and values."""
    dropout: float = 0.1
    """Dropout in the K, Q and V networks."""

    def __post_init__(self) -> None:
        if self.window < 3:
            raise UsageError(f"window={self.window}: two motions need at least 3 snapshots")
        if min(self.weights, self.hidden, self.key) < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"{self}: widths count from 1, dropout lies in [0, 1)")

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.weights if self.inputs == "raw" else len(MOTION) + len(self.signals)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals in a token."""
        return {"gain": SIGNALS, "motion": CLOCK, "raw": ()}[self.inputs]


def motion_BTF(windows_BWK: Tensor) -> Tensor:
    """How the weights moved at each of a window's T = W - 1 steps, in the order of MOTION.

    With w_t the sampled weights, s the root mean square (RMS) of the newest, and d_t = (w_t - w_(t-1)) / s:
    log_step: log RMS(d_t). cosine: between d_t and d_(t-1), 0 at the first. log_displacement: log RMS((w_t - w_0) / s).
    straightness: that displacement over the path, sum of RMS(d_i) up to t. change_of_log_step: log_step less the one
    before, 0 at the first. evenness: mean |d_t| / RMS(d_t), which is small where few weights do all the moving.

    None of them changes with the layer's scale, nor with the order or, in expectation, the number of the weights.
    """
    scale_B11 = rms(windows_BWK[:, -1:]).unsqueeze(-1) + _EPS
    scaled_BWK = windows_BWK / scale_B11
    steps_BTK = scaled_BWK.diff(dim=1)
    size_BT = rms(steps_BTK)
    displacement_BT = rms(scaled_BWK[:, 1:] - scaled_BWK[:, :1])
    log_step_BT = (size_BT + _EPS).log()
    cosine_BT = F.cosine_similarity(steps_BTK[:, 1:], steps_BTK[:, :-1], dim=-1, eps=_EPS)
    columns = (
        log_step_BT,
        F.pad(cosine_BT, (1, 0)),
        (displacement_BT + _EPS).log(),
        displacement_BT / (size_BT.cumsum(dim=1) + _EPS),
        F.pad(log_step_BT.diff(dim=1), (1, 0)),
        steps_BTK.abs().mean(dim=-1) / (size_BT + _EPS),
    )
    return torch.stack(columns, dim=-1)


class FreezePredictor(nn.Module):
    """Answers whether a layer may be frozen now.

    The layout is SmartFRZ's as third parties read it: three networks make keys, queries and values; the query comes
    from the newest token, keys and values from the older ones; one head; z = sum softmax(q k_t / sqrt(d)) v_t; an
    output network. Ours: but for `inputs="raw"` tokens are scale-free (raw weights do not transfer to another
    architecture), and the newest token's own value joins z; else it would reach the output through the scores alone.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.networks = _Networks(3, (config.width, config.hidden, config.hidden, config.key), config.dropout)
        joined = config.key * (1 if config.inputs == "raw" else 2)
        self.output = nn.Sequential(nn.Linear(joined, config.key), nn.ReLU(), nn.Linear(config.key, 1))
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("deviation", torch.ones(config.width))

    def forward(self, windows_BWK: Tensor, signals_BWS: Tensor) -> Tensor:
        """logit_B: above zero means more likely freezable than not.

        windows_BWK: the sampled weights, oldest snapshot first; of more weights than the configured K, K are taken.
        signals_BWS: the signals at the same snapshots, in the order of predictor.model.features.SIGNALS; at least the
            clock's where it takes no others.
        """
        return self.judge(self.tokens(windows_BWK, signals_BWS))

    def tokens(self, windows_BWK: Tensor, signals_BWS: Tensor) -> Tensor:
        """tokens_BTF before scaling. They hold no parameter, so a training computes them once."""
        if windows_BWK.shape[1] != self.config.window or windows_BWK.shape[2] < self.config.weights:
            raise UsageError(
                f"windows of shape {tuple(windows_BWK.shape)}: this predictor needs {self.config.window} snapshots of "
                f"at least {self.config.weights} weights"
            )
        if signals_BWS.shape[-1] < len(self.config.signals):
            raise UsageError(f"{signals_BWS.shape[-1]} signals: this predictor needs {', '.join(self.config.signals)}")
        windows_BWK = thinned(windows_BWK, self.config.weights).float()
        if self.config.inputs == "raw":
            return windows_BWK
        signals_BTS = signals_BWS[:, 1:, : len(self.config.signals)].float()
        return torch.cat([motion_BTF(windows_BWK), signals_BTS], dim=-1)

    def judge(self, tokens_BTF: Tensor) -> Tensor:
        """logit_B from unscaled tokens."""
        tokens_BTF = (tokens_BTF - self.mean) / (self.deviation + _EPS)
        made_3BTD = self.networks(tokens_BTF.flatten(0, 1)).unflatten(1, tokens_BTF.shape[:2])
        key_BTD, query_BTD, value_BTD = made_3BTD.unbind()
        z_B1D = F.scaled_dot_product_attention(query_BTD[:, -1:], key_BTD[:, :-1], value_BTD[:, :-1])
        z_BD = z_B1D.squeeze(1)
        if self.config.inputs != "raw":
            z_BD = torch.cat([z_BD, value_BTD[:, -1]], dim=-1)
        logit_B: Tensor = self.output(z_BD).squeeze(-1)
        return logit_B

    @torch.no_grad()
    def calibrate(self, slope: float, shift: float) -> None:
        """From here on answer slope x logit + shift."""
        last = self.output[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(slope)
        last.bias.mul_(slope).add_(shift)

    @torch.no_grad()
    def fit_scaling(self, tokens_NTF: Tensor) -> None:
        """Take mean and deviation from the training windows' tokens. They are stored with the weights."""
        flat = tokens_NTF.flatten(0, 1)
        if self.config.inputs == "raw":  # one scale for all: a position has no meaning across layers
            self.mean.fill_(float(flat.mean()))
            self.deviation.fill_(float(flat.std()))
        else:
            self.mean.copy_(flat.mean(dim=0))
            self.deviation.copy_(flat.std(dim=0))


class _Networks(nn.Module):
    """Several networks of the same widths side by side, on the same inputs: as many calls as one of them would take.

    A decision is so small that its time is that of the calls.
    """

    def __init__(self, count: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        shapes = list(pairwise(widths))
        linears = [[nn.Linear(inputs, outputs) for inputs, outputs in shapes] for _ in range(count)]
        stacks = list(zip(*linears, strict=True))
        self.weights = nn.ParameterList(torch.stack([one.weight.detach().T for one in stack]) for stack in stacks)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in stack]) for stack in stacks)

    def forward(self, inputs_NF: Tensor) -> Tensor:
        """outputs_CND of the C networks; ReLU and dropout between the layers."""
        x_CNF = inputs_NF.expand(self.weights[0].shape[0], *inputs_NF.shape)
        for place, (weight_CFD, bias_C1D) in enumerate(zip(self.weights, self.biases, strict=True)):
            if place:
                x_CNF = F.dropout(x_CNF.relu(), self.dropout, self.training)
            x_CNF = torch.baddbmm(bias_C1D, x_CNF, weight_CFD)
        return x_CNF

"""The freeze predictor's network: attention over a window of one layer's snapshots."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.model.config import PredictorConfig

_EPS = 1e-8


class FreezePredictor(nn.Module):
    """Answers whether a layer may be frozen now.

    The layout is SmartFRZ's as third parties read it. Three networks make keys, queries and values. The query comes
    from the newest token, keys and values from the older ones. There is one head, z = sum softmax(q k_t / sqrt(d)) v_t,
    and an output network. Ours differs in two points. Tokens are scale-free, except with `inputs="raw"`: raw weights do
    not transfer to another architecture. And the newest token's own value joins z, because it would otherwise reach the
    output through the scores alone.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = Scaling(config.width)
        self.networks = _Networks(3, (config.width, config.hidden, config.hidden, config.key), config.dropout)
        joined = config.key * (1 if config.inputs == "raw" else 2)
        self.output = nn.Sequential(nn.Linear(joined, config.key), nn.ReLU(), nn.Linear(config.key, 1))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """logit_B of tokens from `predictor.model.features.tokens`: above 0 means more likely freezable than not."""
        tokens_BTD = self.scaling(tokens_BTD)
        made_3BTD = self.networks(tokens_BTD.flatten(0, 1)).unflatten(1, tokens_BTD.shape[:2])
        key_BTD, query_BTD, value_BTD = made_3BTD.unbind()
        z_B1D = F.scaled_dot_product_attention(query_BTD[:, -1:], key_BTD[:, :-1], value_BTD[:, :-1])
        z_BD = z_B1D.squeeze(1)
        if self.config.inputs != "raw":
            z_BD = torch.cat([z_BD, value_BTD[:, -1]], dim=-1)
        logit_B: Tensor = self.output(z_BD).squeeze(-1)
        return logit_B


class Scaling(nn.Module):
    """Tokens less a mean, over a deviation. Both come from the training windows and are stored with the weights."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """The scaled tokens."""
        return (tokens_BTD - self.mean) / (self.deviation + _EPS)


class _Networks(nn.Module):
    """Several networks of the same widths on the same inputs, in as many calls as one of them would take.

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
        """outputs_CND of the C networks, with ReLU and dropout between the layers."""
        x_CNF = inputs_NF.expand(self.weights[0].shape[0], *inputs_NF.shape)
        for index, (weight_CFD, bias_C1D) in enumerate(zip(self.weights, self.biases, strict=True)):
            if index:
                x_CNF = F.dropout(x_CNF.relu(), self.dropout, self.training)
            x_CNF = torch.baddbmm(bias_C1D, x_CNF, weight_CFD)
        return x_CNF

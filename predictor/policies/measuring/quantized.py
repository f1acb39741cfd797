"""A quantized copy of a model's weights, with which the model can be compared later."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class QuantizedReference:
    """A copy of a model's parameters and buffers: weights as int8, the rest in full precision.

    Floating-point parameters of two or more dimensions are rounded symmetrically, with one scale for each index of the
    first dimension (the output channel of linear layers and convolutions): scale = max |w| / 127, and round(w / scale)
    is stored. Biases, norms and floating-point buffers are stored as they are. To run the copy, let `weights()` replace
    the model's own for one pass. It computes in floating point: it has the rounding of int8, not its speed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rounded: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._rest: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if not tensor.is_floating_point():
                    continue
                if isinstance(tensor, nn.Parameter) and tensor.dim() >= 2 and tensor.numel():
                    self._rounded[name], self._scales[name] = rounded(tensor)
                else:
                    self._rest[name] = tensor.detach().clone()

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, in the precision of the model."""
        wide = {name: (self._rounded[name] * scale).to(scale.dtype) for name, scale in self._scales.items()}
        return {**wide, **self._rest}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The stored tensors, on the CPU."""
        parts = {"rounded": self._rounded, "scales": self._scales, "rest": self._rest}
        return {part: {name: tensor.cpu() for name, tensor in kept.items()} for part, kept in parts.items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Mapping[str, Tensor]], model: nn.Module) -> "QuantizedReference":
        """The reference of a `state_dict`, each tensor on the device of the model's own."""
        devices = {name: tensor.device for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        reference = cls.__new__(cls)
        reference._rounded, reference._scales, reference._rest = (
            {name: tensor.to(devices[name]) for name, tensor in state[part].items()}
            for part in ("rounded", "scales", "rest")
        )
        return reference


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 from -127 to 127, and its scales, with which it is multiplied back.

    There is one scale for each index of the first dimension, in the weight's precision. It is 1 where all are zero.
    """
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    scales = largest / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.detach() / scales).round().clamp(-127, 127).to(torch.int8), scales

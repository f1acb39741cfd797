"""What a model's layers cost: FLOPs of one forward pass, and of a step with any layers frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from predictor.layers.isolated_pass import isolated
from predictor.layers.layer import Layer
from predictor.layers.tensors import copied, tensors_in


@dataclass(frozen=True)
class LayerFlops:
    """Multiplications and additions of one forward pass on one batch, by layer.

    Matrix products, convolutions and attention, as PyTorch's FlopCounterMode counts them; not normalization,
    elementwise operations and the optimizer's work. What happens between two layers, such as the product of attention
    scores and values, counts for the one before.
    """

    forward_L: tuple[int, ...]
    """FLOPs of each layer's part of the forward pass, front to back."""
    weightless_L: tuple[int, ...]
    """The share of these in products of two activations, without any weight."""
    entry_L: tuple[int, ...]
    """FLOPs of each layer's first product, whose input is the output of the layer before."""
    head: int
    """FLOPs of all that follows the last layer."""

    def step(self, frozen: frozenset[int], cached: bool = False) -> int:
        """FLOPs of a forward and backward pass with some layers frozen.

        A product with a weight costs once more for the weight's gradient, where it trains, and once more for the
        input's, where a layer in front of it trains. A product of two activations costs twice more, for both inputs.

        Args:
            frozen: indices of the frozen layers.
            cached: leave out the forward pass of the frozen prefix.
        """
        layers = range(len(self.forward_L))
        first = next((index for index in layers if index not in frozen), len(layers))
        forward = self.head + sum(self.forward_L[first if cached else 0 :])
        weights = self.head + sum(self._weighted(index) for index in layers if index not in frozen)
        inputs = sum(self._weighted(index) + 2 * self.weightless_L[index] for index in layers[first:])
        inputs += self.head - self.entry_L[first] if first < len(layers) else 0
        return forward + weights + inputs

    def share(self, frozen: frozenset[int]) -> float:
        """The cost of a step with these layers frozen, as a share of a full step's, from 0 to 1."""
        return self.step(frozen) / max(self.step(frozenset()), 1)

    def _weighted(self, index: int) -> int:
        return self.forward_L[index] - self.weightless_L[index]


def count_flops(
    model: nn.Module, layers: Sequence[Layer], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerFlops:
    """Run `model` once on these inputs, and count its FLOPs.

    The model is left as it was (see `isolated`). Where a frozen prefix ends inside a block, a side branch that starts
    there is counted as if it needed its input's gradient, which it does not: under one percent in a ResNet.

    Args:
        model: the model itself, without wrappers.
        layers: its layers, front to back.
        args: positional inputs.
        kwargs: named inputs.

    Raises:
        Exception: what the model raises.
    """
    counter = _Counter(layers, model)
    # The table of known operators lacks the CPU's fused attention; its plain form has the same products.
    args, kwargs = copied((args, dict(kwargs)))
    with isolated(model), sdpa_kernel(SDPBackend.MATH), counter:
        model.forward(*args, **kwargs)  # not the hooks on the model itself, which are the training's
    *forward_L, head = counter.forward
    return LayerFlops(tuple(forward_L), tuple(counter.weightless[:-1]), tuple(counter.entry[:-1]), head)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator for the layer whose parameter was used last. The last index is the head's."""

    def __init__(self, layers: Sequence[Layer], model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = {id(parameter): len(layers) for parameter in model.parameters()}
        self._owner.update({id(p): index for index, layer in enumerate(layers) for p in layer.parameters()})
        self._made_of_weights: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id
        self._now = 0
        self.forward = [0] * (len(layers) + 1)
        self.weightless = [0] * (len(layers) + 1)
        self.entry = [0] * (len(layers) + 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # a composite operator is counted by its parts
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        weights = [tensor for tensor in tensors if id(tensor) in self._owner or id(tensor) in self._made_of_weights]
        for tensor in weights:
            self._now = self._owner.get(id(tensor), self._now)
        if count is not None:
            flops = int(count(*args, **kwargs, out_val=result))
            self.forward[self._now] += flops
            self.weightless[self._now] += 0 if weights else flops
            self.entry[self._now] = self.entry[self._now] or flops * bool(weights)
        elif tensors and len(weights) == len(tensors):  # a transposed or cast weight is still a weight
            self._made_of_weights.update({id(tensor): tensor for tensor in tensors_in(result)})
        return result

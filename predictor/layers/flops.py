"""What a model's layers cost: FLOPs of one forward pass, and of a step with any layers frozen."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from predictor.layers.isolated_pass import isolated
from predictor.layers.layer import Layer
from predictor.layers.tensors import Storages, converted, few_samples, tensors_in

_LARGEST = 2**28
"""Elements of a result from which nothing is computed: 1 GB in float32, which attention without fusion exceeds."""


_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
"""Operators that compute a recurrent layer as a whole. PyTorch's table of operators lacks them."""


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
    """FLOPs of each layer's first product, whose input is the output of the layer before. Of a layer with adapters,
    those of all its products in front of the first weight that trains."""
    head: int
    """FLOPs of all that follows the last layer."""
    untrained_L: tuple[int, ...] = ()
    """FLOPs of each layer's products with weights that never train, such as those under adapters. Empty for none."""
    untrained_head: int = 0
    """The same of the head."""
    constant_L: tuple[int, ...] = ()
    """FLOPs that gradients with respect to inputs would cost in layers that depend on nothing that trains, such as a
    teacher's. Empty for none."""
    constant_head: int = 0
    """FLOPs of the head's products that depend on nothing that trains."""
    inner_head: int = 0
    """FLOPs of the head's products behind one of its own weights that trains."""
    resting: frozenset[int] = frozenset()
    """Indices of layers in which nothing trains."""
    reaches: int | None = None
    """The first layer whose input has a gradient whatever is frozen: one that the user asked for, or one for a part of
    the head in front of it, such as a tied embedding. None where there is no such layer."""
    recomputed: tuple[tuple[int, int], ...] = ()
    """The parts whose activations are checkpointed: the last layer in each, and the FLOPs that the backward pass
    computes once more where it reaches that layer. All but the last product: nothing needs its result."""

    def step(self, frozen: frozenset[int], cached: bool = False) -> int:
        """FLOPs of a forward and backward pass with some layers frozen.

        A product with a weight costs once more for the weight's gradient, where it trains, and once more for the
        input's, where a layer in front of it trains. A product of two activations costs twice more, for both inputs.

        Args:
            frozen: indices of the frozen layers.
            cached: leave out the forward pass of the frozen prefix.
        """
        layers = range(len(self.forward_L))
        behind = next((index for index in layers if index not in frozen), len(layers))
        first = next((index for index in layers if index not in frozen | self.resting), len(layers))
        forward = self.head + sum(self.forward_L[behind if cached else 0 :])
        weights = self.head - self.untrained_head
        weights += sum(self._weighted(index) - self._untrained(index) for index in layers if index not in frozen)
        reached = self.reaches is not None and self.reaches <= first
        begin = self.reaches if reached and self.reaches is not None else first
        inputs = sum(self._weighted(index) + 2 * self.weightless_L[index] for index in layers[begin:])
        inputs += self.head - self.constant_head if begin < len(layers) or reached else self.inner_head
        inputs -= self.entry_L[first] if first < len(layers) and not reached else 0
        inputs -= sum(self.constant_L[begin:])
        forward += sum(flops for last, flops in self.recomputed if last >= begin)
        return forward + weights + inputs

    def share(self, frozen: frozenset[int]) -> float:
        """The cost of a step with these layers frozen, as a share of a full step's, from 0 to 1."""
        return self.step(frozen) / max(self.step(frozenset()), 1)

    def as_dict(self) -> dict[str, Any]:
        """As numbers and lists, for a state."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return values | {"resting": sorted(self.resting), "recomputed": list(map(list, self.recomputed))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerFlops":
        """From what `as_dict` gave."""
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        resting, recomputed = frozenset(values["resting"]), tuple((last, flops) for last, flops in values["recomputed"])
        return cls(**lists | {"resting": resting, "recomputed": recomputed})

    def _weighted(self, index: int) -> int:
        return self.forward_L[index] - self.weightless_L[index]

    def _untrained(self, index: int) -> int:
        return self.untrained_L[index] if self.untrained_L else 0


def count_flops(
    model: nn.Module,
    layers: Sequence[Layer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trained: Collection[int] | None = None,
) -> LayerFlops:
    """Run `model` once on these inputs, and count its FLOPs.

    It runs in the modes that its modules are in, since some heads and losses are computed in training alone. Where that
    leaves layers out, as LayerDrop does at random, or fails, it runs in evaluation mode.

    The model is left as it was (see `isolated`). Where a frozen prefix ends inside a block, a side branch that starts
    there is counted as if it needed its input's gradient, which it does not: under one percent in a ResNet.

    Where a result would be large, as that of attention without fusion over a long text, nothing is computed: tensors
    without memory have the same shapes. A model that cannot run on these is run on two samples.

    Args:
        model: the model itself, without wrappers.
        layers: its layers, front to back.
        args: positional inputs.
        kwargs: named inputs.
        trained: ids of the parameters that train unless they are frozen. By default all.

    Raises:
        Exception: what the model raises, or MemoryError; its message says why FLOPs cannot be counted.
    """
    trained = {id(parameter) for parameter in model.parameters()} if trained is None else trained
    inputs = args, dict(kwargs)
    count = partial(_counted, model, layers, trained)
    try:
        return count(inputs)
    except _TooLarge:
        pass
    try:
        return count(inputs, without_memory=True)
    except Exception:  # what a model reads from its tensors, those without memory do not have
        pass
    try:
        return count(few_samples(inputs))
    except _TooLarge:
        raise MemoryError("a pass over two samples, without fused attention, would take too much memory") from None


def _counted(
    model: nn.Module,
    layers: Sequence[Layer],
    trained: Collection[int],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    without_memory: bool = False,
) -> LayerFlops:
    in_evaluation, in_training = (_Counter(layers, model, trained, without_memory) for _ in range(2))
    try:
        _run(in_training, model, inputs, without_memory, as_in_training=True)
    except _TooLarge:
        raise
    except Exception:  # seen again, unless evaluation mode does without what failed
        _run(in_evaluation, model, inputs, without_memory)
        return in_evaluation.flops(layers)
    if in_training.left_out:
        _run(in_evaluation, model, inputs, without_memory)
        if in_evaluation.left_out < in_training.left_out:
            return in_evaluation.flops(layers)
    return in_training.flops(layers)


def _run(
    counter: "_Counter",
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    without_memory: bool,
    as_in_training: bool = False,
) -> None:
    # Transformers' layers checkpoint in training mode only.
    checkpointing = [m for m in model.modules() if m.training and getattr(m, "gradient_checkpointing", False) is True]
    # The table of known operators lacks the CPU's fused attention; its plain form has the same products.
    passing = isolated(model, as_in_training=as_in_training)
    with passing, torch.no_grad(), counter.finally_forgetting(), sdpa_kernel(SDPBackend.MATH):
        for module in checkpointing:
            module.training = True
        if without_memory:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            args, kwargs = converted(inputs, partial(_without_memory, mode))
            with mode, counter:
                model.forward(*args, **kwargs)
        else:
            args, kwargs = converted(inputs, _alike)
            with counter:
                model.forward(*args, **kwargs)  # not the hooks on the model itself, which are the training's


def _alike(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _without_memory(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)


class _TooLarge(Exception):
    """Ends a pass before a result that takes much memory."""


class _Behind(NamedTuple):
    """What a tensor depends on."""

    layer: int = -1
    """The last layer of those whose training weights it depends on."""
    reached: bool = False
    """Whether a gradient goes through it whatever is frozen."""
    constant: bool = True
    """Whether it depends on nothing that trains."""

    def with_(self, other: "_Behind") -> "_Behind":
        """What depends on both depends on."""
        return _Behind(max(self.layer, other.layer), self.reached or other.reached, self.constant and other.constant)


_NOTHING = _Behind()


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator for the layer whose parameter was used last. The last index is the head's.

    Args:
        layers: the layers.
        model: the model.
        trained: ids of the parameters that train.
        none_is_too_large: whether results take no memory.
    """

    def __init__(
        self, layers: Sequence[Layer], model: nn.Module, trained: Collection[int], none_is_too_large: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._head = len(layers)
        self._owner = {id(parameter): self._head for parameter in model.parameters()}
        self._owner.update({id(p): index for index, layer in enumerate(layers) for p in layer.parameters()})
        self._trained = trained
        self._none_is_too_large = none_is_too_large
        self._made_of_weights: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id
        self._behind = Storages()
        self._now = 0
        self.forward = [0] * (len(layers) + 1)
        self.weightless = [0] * (len(layers) + 1)
        self.entry = [0] * (len(layers) + 1)
        self._untrained = [0] * (len(layers) + 1)
        self._in_front = [0] * (len(layers) + 1)  # of the first weight in this layer that trains
        self._constant = [0] * (len(layers) + 1)
        self._inner = 0
        self._part: FrameType | None = None
        self._recomputed: list[list[int]] = []
        self._last = 0
        self._reaches: int | None = None
        self.left_out = set(range(len(layers)))
        """Indices of the layers of which nothing has run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor without memory for its device
            return func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # a composite operator is counted by its parts
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._refuse_large(func, args)
        result = func(*args, **kwargs)
        results = list(tensors_in(result))
        if not self._none_is_too_large and any(tensor.numel() > _LARGEST for tensor in results):
            raise _TooLarge
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        weights = [tensor for tensor in tensors if id(tensor) in self._owner or id(tensor) in self._made_of_weights]
        for tensor in weights:
            self._now = self._owner.get(id(tensor), self._now)
            self.left_out.discard(self._now)
        inputs, own, factors = _NOTHING, _NOTHING, _NOTHING
        for tensor in tensors:
            if id(tensor) in self._owner or id(tensor) in self._made_of_weights:
                behind = self._behind_weight(tensor)
                own = own.with_(behind)
                factors = factors.with_(behind) if tensor.dim() > 1 else factors  # a bias may train alone
            else:
                inputs = inputs.with_(self._behind.get(tensor, _NOTHING))
                inputs = inputs.with_(_Behind(reached=True, constant=False)) if tensor.requires_grad else inputs
        if count is not None:
            flops = int(count(*args, **kwargs, out_val=result))
            self._add(flops, bool(weights), inputs, factors)
        elif func._opname in _RECURRENT:
            for flops in _recurrent_products(args):
                self._add(flops, True, inputs, factors)
                inputs = inputs.with_(factors)  # the next product is one with the state, or with a layer's output
        if tensors and len(weights) == len(tensors):  # a transposed or cast weight is still a weight
            self._made_of_weights.update({id(tensor): tensor for tensor in results})
        behind = inputs.with_(own)
        for tensor in results:
            if behind != _NOTHING and id(tensor) not in self._owner:
                self._behind.set(tensor, behind)
        return result

    @contextmanager
    def finally_forgetting(self) -> Iterator[None]:
        """A context after which the pass's frames, and what they hold, are free."""
        try:
            yield
        finally:
            self._part = None

    def flops(self, layers: Sequence[Layer]) -> LayerFlops:
        """What was counted."""
        *forward_L, head = self.forward
        *untrained_L, untrained_head = self._untrained
        resting = frozenset(
            index for index, layer in enumerate(layers) if not any(id(p) in self._trained for p in layer.parameters())
        )
        *constant, constant_head = self._constant
        constant_L = tuple(flops if index in resting else 0 for index, flops in enumerate(constant))
        pairs = zip(untrained_L, self._in_front, self.entry, strict=False)
        return LayerFlops(
            tuple(forward_L),
            tuple(self.weightless[:-1]),
            tuple(in_front if untrained else entry for untrained, in_front, entry in pairs),
            head,
            tuple(untrained_L) if any(untrained_L) else (),
            untrained_head,
            constant_L if any(constant_L) else (),
            constant_head,
            self._inner,
            resting,
            self._reaches,
            tuple((last, flops) for last, flops in self._recomputed if flops),
        )

    def _add(self, flops: int, has_weight: bool, inputs: _Behind, own: _Behind) -> None:
        """Count a product."""
        now = self._now
        self.forward[now] += flops
        if not has_weight:
            self.weightless[now] += flops
        else:
            self.entry[now] = self.entry[now] or flops
            self._untrained[now] += flops if own.constant else 0
            self._in_front[now] += flops if inputs.layer < now else 0
        if inputs.constant:
            self._constant[now] += flops if has_weight or now == self._head else 2 * flops
        if now == self._head and inputs.reached:
            self._inner += flops
        if now < self._head and inputs.reached:
            self._reaches = now if self._reaches is None else min(self._reaches, now)
        self._add_recomputed(flops)

    def _add_recomputed(self, flops: int) -> None:
        part = _checkpointed_part()
        if part is not None and part is self._part:
            self._recomputed[-1] = [self._now, self._recomputed[-1][1] + self._last]
        elif part is not None:
            self._recomputed.append([self._now, 0])
        self._part, self._last = part, flops

    def _behind_weight(self, tensor: Tensor) -> _Behind:
        if id(tensor) in self._made_of_weights:
            found: _Behind = self._behind.get(tensor, _NOTHING)
            return found
        if id(tensor) not in self._trained:
            return _NOTHING
        layer = self._owner[id(tensor)]
        return _Behind(layer if layer < self._head else -1, reached=layer == self._head, constant=False)

    def _refuse_large(self, func: Any, args: Any) -> None:
        """Stop before a result that takes much memory, such as attention's scores or their biases by position."""
        aten = torch.ops.aten
        if self._none_is_too_large or func._overloadpacket not in (aten.bmm, aten.baddbmm, aten.embedding):
            return
        left, right = (args[1], args[0]) if func._overloadpacket is aten.embedding else args[-2:]
        rows = left.shape if func._overloadpacket is aten.embedding else left.shape[:-1]
        if rows.numel() * right.shape[-1] > _LARGEST:
            raise _TooLarge


def _recurrent_products(args: Any) -> list[int]:
    """FLOPs of the products with each matrix of a recurrent layer, over all samples and steps of time."""
    rows = args[0].numel() // max(args[0].shape[-1], 1)
    return [2 * rows * weight.numel() for weight in tensors_in(args[1:3]) if weight.dim() == 2]


def _checkpointed_part() -> FrameType | None:
    """The innermost call under way whose activations are checkpointed. There is no public function for it."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file == checkpoint.__file__ and name == "checkpoint":
            return frame
        if file.endswith("modeling_layers.py"):  # Transformers' layers, which do not checkpoint without gradients
            layer = frame.f_locals.get("self")
            if getattr(layer, "gradient_checkpointing", False) is True and getattr(layer, "training", False):
                return frame
    return None

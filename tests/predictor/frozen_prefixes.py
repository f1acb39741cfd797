"""What must hold of a frozen prefix, for any model, however its layers were found."""

import torch
from torch import Tensor
from torch.ops import aten
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

from predictor.freezing.freeze import freeze


def call(model, example):
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def left_out(model, layers):
    """Names of the parameters that are in no layer. Checks that none is in two."""
    held = [id(parameter) for layer in layers for parameter in layer.parameters()]
    assert len(held) == len(set(held))
    return {name for name, parameter in model.named_parameters() if id(parameter) not in set(held)}


def inside(model, *names):
    """Names of the parameters in these modules."""
    prefixes = tuple(f"{name}." for name in names)
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def check_order(model, example, layers, blocks):
    """Weights are called in the layers' order; those of one block may be called among another's."""
    first = {}
    handles = [
        module.register_forward_pre_hook(lambda module, _: first.update({module: first.get(module, len(first))}))
        for module in model.modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    model.eval()
    with torch.no_grad():
        call(model, example)
    for handle in handles:
        handle.remove()
    end = begin = -1
    for layer in layers:
        indices = sorted(first[module] for module in layer.modules if module in first)
        if "+" in layer.name:
            indices = indices[:1]  # of tied modules the first call counts
        assert not indices or indices[0] > end
        end = max(indices, default=end)
    for block in blocks:
        indices = [first[module] for module in block.modules if module in first]
        assert min(indices) > begin
        begin = min(indices)


class Step(TorchDispatchMode):
    """A forward pass: its FLOPs before and after the first use of a parameter that trains.

    Before that nothing may want a gradient, so that the backward pass has nowhere to go.
    """

    def __init__(self, model):
        super().__init__()
        self.front = self.rest = 0
        self._training = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self._begun = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._begun |= any(id(tensor) in self._training for tensor in tensors)
        if not self._begun:
            assert not any(tensor.requires_grad for tensor in tensors), f"{func} is before the prefix's end"
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.front, self.rest = self.front + flops * (not self._begun), self.rest + flops * self._begun
        return result


def freeze_all(layers):
    for layer in layers:
        freeze(layer)


def check_ends(model, example, prefixes):
    """With these layers frozen, one prefix after the other, nothing wants a gradient before what trains."""
    left = []
    for prefix in prefixes:
        freeze_all(prefix)
        model.train()
        with Step(model) as step:
            call(model, example)
        left.append(step.rest)
    assert left == sorted(set(left), reverse=True)


def _convolution_backward(grad, inputs, weight, _bias, _stride, _pad, _dilation, transposed, _out, _groups, mask, **_):
    # torch's own formula forgets the groups in the weights' gradient.
    return sum(mask[:2]) * conv_flop_count(inputs, weight, grad, transposed)


def flops(model, example, loss_of):
    """A step's FLOPs: of the forward pass in front of the first weight that trains, behind it, and of the backward."""
    model.train()
    with Step(model) as step:
        loss = loss_of(call(model, example))
    own = {aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        loss.backward()
    model.zero_grad()
    return step.front, step.rest, counter.get_total_flops()

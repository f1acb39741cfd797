"""What "frozen" means: here, and nowhere else.

A frozen layer's parameters want no gradient and have none, so that no optimizer moves them, not even by momentum or
weight decay. They stay in their parameter group, so that the optimizer's state loads on resume and no scheduler
notices. Their optimizer state is dropped, which returns its memory; a thawed layer starts with fresh state. The
layer's modules are in evaluation mode and stay there through `model.train()`: running statistics stand still, dropout
is off, and the layer's output depends on its input alone. So is what stands around frozen layers only.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial

from torch import nn
from torch.optim import Optimizer

from predictor.freezing.layers import Layer


def freeze(layer: Layer, optimizers: Iterable[Optimizer] = ()) -> None:
    """Freeze a layer. Optimizer state is dropped from those of `optimizers` that hold the layer's parameters."""
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)
    for module in _parts(layer):
        module.eval()
        # An attribute of the instance, found before the class's method: no cost in the forward pass, nothing to
        # recompile, and copies and pickles of the module keep it. nn.Module.train calls it on every child.
        module.train = partial(_stay_in_evaluation, module)  # type: ignore[method-assign]


def thaw(layer: Layer, training: bool, still: Collection[int] = ()) -> None:
    """Let a layer train again.

    training: the mode that the rest of the model is in. still: ids of parameters that the user wants to stand still.
    """
    for parameter in layer.parameters():
        if id(parameter) not in still:
            parameter.requires_grad_(True)
    for module in _parts(layer):
        module.__dict__.pop("train", None)
        module.train(training)


def settle_containers(model: nn.Module, layers: Sequence[Layer], frozen: Iterable[int]) -> None:
    """Put modules that hold nothing but frozen layers into evaluation mode too, and the others that were back.

    A container may have dropout of its own, as the attention of a BERT, whose projections are layers of their own.
    """
    frozen = set(frozen)
    parts = {part for layer in layers for part in _parts(layer)}
    still = {id(p) for place, layer in enumerate(layers) if place in frozen for p in layer.parameters()}
    for module in model.modules():
        if module in parts:
            continue
        own = [id(parameter) for parameter in module.parameters()]
        if own and still.issuperset(own):
            module.training = False
            module.train = partial(_stay_in_evaluation, module)  # type: ignore[method-assign]
        elif module.__dict__.pop("train", None) is not None:
            module.training = model.training


def is_frozen(layer: Layer) -> bool:
    """Whether every parameter of the layer stands still."""
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _parts(layer: Layer) -> list[nn.Module]:
    return [part for module in layer.modules for part in module.modules()]


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of a frozen module's `train`."""
    return module

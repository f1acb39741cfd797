"""What "frozen" means: here, and nowhere else.

A frozen layer's parameters want no gradient and have none, so that no optimizer moves them, not even by momentum or
weight decay. They stay in their parameter group, so that the optimizer's state loads on resume and no scheduler
notices. Their optimizer state is dropped, which returns its memory; a thawed layer starts with fresh state. The
layer's modules are in evaluation mode and stay there through `model.train()`: running statistics stand still, dropout
is off, and the layer's output depends on its input alone. So is what stands around frozen layers only. What the user
holds in evaluation mode, by giving a module a `train` of its own, stays there when layers thaw.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from predictor.layers.layer import Layer


def freeze(layer: Layer, optimizers: Iterable[Optimizer] = ()) -> None:
    """Freeze a layer. Optimizer state is dropped from those of `optimizers` that hold the layer's parameters."""
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)
    for module in _parts(layer):
        module.eval()
        _hold(module)


def thaw(layers: Iterable[Layer], model: nn.Module, still: Collection[int] = ()) -> None:
    """Let layers of `model` train again, in the mode that it is in.

    still: ids of parameters that the user wants to stand still.
    """
    theirs = _held_by_user(model)
    for layer in layers:
        for parameter in layer.parameters():
            if id(parameter) not in still:
                parameter.requires_grad_(True)
        for module in _parts(layer):
            _let_go(module)
            if module not in theirs:
                module.train(model.training)


def settle_containers(model: nn.Module, layers: Sequence[Layer], frozen: Iterable[int]) -> None:
    """Put modules that hold nothing but frozen layers into evaluation mode too, and the others that were back.

    A container may have dropout of its own, as the attention of a BERT, whose projections are layers of their own.
    """
    frozen = set(frozen)
    parts = {part for layer in layers for part in _parts(layer)}
    theirs = _held_by_user(model)
    still = {id(p) for place, layer in enumerate(layers) if place in frozen for p in layer.parameters()}
    for module in model.modules():
        if module in parts:
            continue
        own = [id(parameter) for parameter in module.parameters()]
        if own and still.issuperset(own):
            if module not in theirs:
                module.training = False
                _hold(module)
        elif _let_go(module) and module not in theirs:
            module.training = model.training


def warn_of_left(layers: Sequence[Layer]) -> None:
    """Warn where a controller that never let them go has frozen layers already: they look like the user's choice."""
    left = [layer.name for layer in layers if _is_held(layer)]
    if left:
        warnings.warn(
            f"{len(left)} of {len(layers)} layers, the first {left[0]!r}, were left frozen by an earlier controller, "
            "as in a training that was interrupted, and will not train: call release() of that controller before the "
            "optimizer is made, or make the model anew",
            stacklevel=3,
        )


def is_frozen(layer: Layer) -> bool:
    """Whether every parameter of the layer stands still."""
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _parts(layer: Layer) -> list[nn.Module]:
    return [part for module in layer.modules for part in module.modules()]


def _hold(module: nn.Module) -> None:
    """Have a module stay in the mode that it is in."""
    if _holds(module):
        return
    # An attribute of the instance, found before the class's method: no cost in the forward pass, nothing to
    # recompile, and copies and pickles of the module keep it. nn.Module.train calls it on every child.
    former = module.__dict__.get("train")
    module.train = partial(_stay_in_evaluation, module, former=former)  # type: ignore[method-assign]


def _let_go(module: nn.Module) -> bool:
    """Undo `_hold`, and say whether there was something to undo."""
    if not _holds(module):
        return False
    former = _users(module)
    del module.train
    if former is not None:
        module.train = former  # type: ignore[method-assign]
    return True


def _holds(module: nn.Module) -> bool:
    """Whether a module's `train` is ours."""
    return getattr(module.__dict__.get("train"), "func", None) is _stay_in_evaluation


def _is_held(layer: Layer) -> bool:
    """Whether `freeze` has been at a layer; parameters alone may stand still by the user's wish."""
    parts = _parts(layer)
    return bool(parts) and all(map(_holds, parts))


def _users(module: nn.Module) -> Callable[..., Any] | None:
    """The user's own `train` of a module, as `encoder.train = disabled_train`, also while ours stands before it."""
    own: Any = module.__dict__.get("train")
    train: Callable[..., Any] | None = own.keywords.get("former") if _holds(module) else own
    return train


def _held_by_user(model: nn.Module) -> set[nn.Module]:
    """Modules in whose modes `model.train()` has no say: those with a `train` of the user's, and all inside them."""
    return {inside for module in model.modules() if _users(module) is not None for inside in module.modules()}


def _stay_in_evaluation(module: nn.Module, mode: bool = True, *, former: object = None) -> nn.Module:
    """Takes the place of a frozen module's `train`. former: that of the user, if there was one."""
    return module

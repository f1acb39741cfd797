"""What "frozen" means. No other file switches gradients or modes of a layer.

- **Parameters** require no gradient and have none. No optimizer moves them, not even by momentum or weight decay.
- **Parameter groups** stay as they are. An optimizer's state loads on resume, and schedulers notice nothing.
- **Optimizer state** of the layer is dropped, which returns its memory. An unfrozen layer starts with fresh state.
- **Modules** are in evaluation mode and stay there through `model.train()`. Running statistics stand still, dropout is
  off, and the layer's output depends on its input alone. Containers that hold only frozen layers are treated alike.
- **What the user holds** stays. A module with a `train` of its own keeps its mode when its layer is unfrozen.
"""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from predictor.layers.layer import Layer


def freeze(layer: Layer, optimizers: Iterable[Optimizer] = ()) -> None:
    """Freeze a layer.

    Args:
        layer: the layer.
        optimizers: the layer's state is dropped from these.
    """
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)
    for module in _modules_in(layer):
        module.eval()
        _hold_mode(module)


def unfreeze(layers: Iterable[Layer], model: nn.Module, still: Collection[int] = ()) -> None:
    """Let layers train again, in the mode that their model is in.

    Args:
        layers: the layers.
        model: the model that they belong to.
        still: ids of parameters that the user froze. They stay frozen.
    """
    users = _held_by_user(model)
    for layer in layers:
        for parameter in layer.parameters():
            if id(parameter) not in still:
                parameter.requires_grad_(True)
        for module in _modules_in(layer):
            _release_mode(module)
            if module not in users:
                module.train(model.training)


def settle_containers(model: nn.Module, layers: Sequence[Layer], frozen: Iterable[int]) -> None:
    """Put modules that hold only frozen layers into evaluation mode, and take others out of it again.

    A container may have dropout of its own. In BERT's attention the projections are layers, and the dropout between
    them belongs to their container.

    Args:
        model: the model.
        layers: all its layers.
        frozen: indices of the frozen ones.
    """
    frozen = set(frozen)
    in_layers = {module for layer in layers for module in _modules_in(layer)}
    users = _held_by_user(model)
    frozen_ids = {id(p) for index, layer in enumerate(layers) if index in frozen for p in layer.parameters()}
    for module in model.modules():
        if module in in_layers:
            continue
        own = [id(parameter) for parameter in module.parameters()]
        if own and frozen_ids.issuperset(own):
            if module not in users:
                module.training = False
                _hold_mode(module)
        elif _release_mode(module) and module not in users:
            module.training = model.training


def warn_of_leftover_freezing(layers: Sequence[Layer]) -> None:
    """Warn of layers that an earlier controller froze and never released: they look as if the user had frozen them."""
    left = [layer.name for layer in layers if _is_mode_held(layer)]
    if left:
        warnings.warn(
            f"{len(left)} of {len(layers)} layers, the first {left[0]!r}, were left frozen by an earlier controller, "
            "as in a training that was interrupted, and will not train: call release() of that controller before the "
            "optimizer is made, or make the model again",
            stacklevel=3,
        )


def is_frozen(layer: Layer) -> bool:
    """Whether no parameter of the layer requires a gradient."""
    return not any(parameter.requires_grad for parameter in layer.parameters())


class GradientGuard:
    """Keeps gradients away from frozen parameters. A step in which none arrives costs nothing.

    Each frozen parameter has a hook that runs in the backward pass once a gradient has been accumulated for it, which
    takes a `requires_grad_(True)` in the user's code. The hook drops that gradient before any optimizer sees it.

    Args:
        report: called with a layer's index at each gradient that was dropped. Held weakly: when its owner is gone, so
            is the guard, and the parameters are the user's again.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report: weakref.WeakMethod[Callable[[int], None]] = weakref.WeakMethod(report)
        self._handles: dict[int, list[RemovableHandle]] = {}

    def guard(self, index: int, layer: Layer) -> None:
        """Guard a layer that is about to freeze. Parameters that the user froze are the user's."""
        hook = partial(_drop_gradient, self._report, index)
        # PyTorch takes such a hook only while the parameter requires a gradient, and keeps it afterwards.
        self._handles[index] = [
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]

    def leave(self, indices: Iterable[int]) -> None:
        """Guard these layers no more."""
        for index in indices:
            for handle in self._handles.pop(index, []):
                handle.remove()

    def close(self) -> None:
        """Guard nothing any more."""
        self.leave(list(self._handles))


def _drop_gradient(report: "weakref.WeakMethod[Callable[[int], None]]", index: int, parameter: Tensor) -> None:
    found = report()
    if found is not None:
        parameter.grad = None
        found(index)


def _modules_in(layer: Layer) -> list[nn.Module]:
    return [inner for module in layer.modules for inner in module.modules()]


def _hold_mode(module: nn.Module) -> None:
    """Have a module stay in the mode that it is in."""
    if _is_held(module):
        return
    # An attribute of the instance, found before the class's method: no cost in the forward pass, nothing to
    # recompile, and copies and pickles of the module keep it. nn.Module.train calls it on every child.
    former = module.__dict__.get("train")
    module.train = partial(_stay_in_evaluation, module, former=former)  # type: ignore[method-assign]


def _release_mode(module: nn.Module) -> bool:
    """Undo `_hold_mode`, and say whether there was something to undo."""
    if not _is_held(module):
        return False
    former = _users_train(module)
    del module.train
    if former is not None:
        module.train = former  # type: ignore[method-assign]
    return True


def _is_held(module: nn.Module) -> bool:
    """Whether a module's `train` is ours."""
    return getattr(module.__dict__.get("train"), "func", None) is _stay_in_evaluation


def _is_mode_held(layer: Layer) -> bool:
    """Whether `freeze` froze the layer. Parameters alone may be frozen by the user."""
    modules = _modules_in(layer)
    return bool(modules) and all(map(_is_held, modules))


def _users_train(module: nn.Module) -> Callable[..., Any] | None:
    """The `train` that the user gave a module, as in `encoder.train = disabled_train`, also while ours covers it."""
    own: Any = module.__dict__.get("train")
    train: Callable[..., Any] | None = own.keywords.get("former") if _is_held(module) else own
    return train


def _held_by_user(model: nn.Module) -> set[nn.Module]:
    """Modules that do not follow `model.train()`: those with a `train` of the user's, and all inside them."""
    return {inner for module in model.modules() if _users_train(module) is not None for inner in module.modules()}


def _stay_in_evaluation(module: nn.Module, mode: bool = True, *, former: object = None) -> nn.Module:
    """Replaces a frozen module's `train`. former: the user's own, if there was one."""
    return module

"""What "frozen" means. No other file but `standstill` switches gradients or modes of a layer.

- **Parameters** require no gradient and have none. No optimizer moves them, not even by momentum or weight decay.
- **Parameter groups** stay as they are. An optimizer's state loads on resume, and schedulers notice nothing.
- **Optimizer state** of the layer is dropped, which returns its memory. An unfrozen layer starts with fresh state.
- **Modules** stand still, through `model.train()` too: running statistics stay, dropout is off, and the layer's output
  depends on its input alone. `standstill` says how. Containers that hold only frozen layers are treated alike.
- **What the user holds** stays. Unfrozen, a layer is as it was when it froze: a parameter that required no gradient
  requires none, and a module that was in another mode than its model, or has a `train` of its own, keeps its mode.
"""

import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from predictor.freezing.standstill import forget_trained, hold, is_held, note_trained, unhold, users_train
from predictor.layers.layer import Layer


def freeze(layer: Layer, optimizers: Iterable[Optimizer] = (), model: nn.Module | None = None) -> None:
    """Freeze a layer.

    Args:
        layer: the layer.
        optimizers: the state of what trained is dropped from these.
        model: the model that the layer belongs to. Without it only `unfreeze` of the layer's own modules brings back
            what trained.
    """
    trained = {id(parameter) for parameter in layer.parameters() if trains(parameter)}
    left = note_trained(_modules_in(layer), trained)
    if left and model is not None:  # those that a container holds itself
        note_trained(model.modules(), left)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        for optimizer in optimizers if id(parameter) in trained else ():
            optimizer.state.pop(parameter, None)
    for module in _modules_in(layer):
        hold(module, model)


def unfreeze(layers: Iterable[Layer], model: nn.Module) -> None:
    """Let layers train again: what trained when they froze, in the mode that their model is in.

    Args:
        layers: the layers.
        model: the model that they belong to.
    """
    layers = list(layers)
    inside = dict.fromkeys(module for layer in layers for module in _modules_in(layer))
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in forget_trained(dict.fromkeys([*inside, *model.modules()]), own):
        parameter.requires_grad_(True)
    _unhold_all(inside, model)


def release(model: nn.Module) -> None:
    """Let a model train that was copied or loaded from one with frozen layers.

    A copy, such as an average of the weights, stands still where the model did when it was copied: its parameters
    require no gradient there, and dropout is off until `train()` is called. Afterwards the copy is as the model was
    before its layers froze. Use it too for a model whose training was interrupted, so that its controller is gone.

        best = copy.deepcopy(model)
        release(best)

    In the model of a running controller call the controller's `release`, which informs all that follow it.
    """
    for parameter in forget_trained(model.modules()):
        parameter.requires_grad_(True)
    _unhold_all(model.modules(), model)


def settle_containers(model: nn.Module, layers: Sequence[Layer], frozen: Iterable[int]) -> None:
    """Have modules that hold only frozen layers stand still, and others follow their model again.

    A container may have dropout of its own. In BERT's attention the projections are layers, and the dropout between
    them belongs to their container. One without parameters, as fake quantization is, counts by the modules inside it.
    What holds nothing of these layers is none of their containers: another controller may have frozen it.

    Args:
        model: the model.
        layers: all that its controller may freeze.
        frozen: indices of the frozen ones.
    """
    frozen = set(frozen)
    in_layers = {module for layer in layers for module in _modules_in(layer)}
    still = {module for index in frozen for module in _modules_in(layers[index])}
    layer_ids = {id(p) for layer in layers for p in layer.parameters()}
    frozen_ids = {id(p) for index in frozen for p in layers[index].parameters()}
    users = _held_by_user(model)
    containers = [module for module in model.modules() if module not in in_layers]
    for module in containers:
        own = [id(parameter) for parameter in module.parameters()]
        within = [inner for inner in module.modules() if inner in in_layers]
        if frozen_ids.issuperset(own) if own else within and still.issuperset(within):
            if module not in users:
                hold(module, model)
        elif is_held(module) and (within or not layer_ids.isdisjoint(own)):
            _unhold_all([module], model)


def settle_observers(model: nn.Module) -> None:
    """Have the observers of frozen modules stand still that had seen no data when their layers froze."""
    for module in model.modules():
        if is_held(module):
            hold(module)


def warn_of_leftover_freezing(layers: Sequence[Layer]) -> None:
    """Warn of layers that an earlier controller froze and never released: they look as if the user had frozen them."""
    left = [layer.name for layer in layers if all(map(is_held, _modules_in(layer))) and layer.modules]
    if left:
        warnings.warn(
            f"{len(left)} of {len(layers)} layers, the first {left[0]!r}, were left frozen by an earlier controller, "
            "as in a training that was interrupted, and will not train: call release() of that controller, or "
            "predictor.release(model), before the optimizer is made",
            stacklevel=3,
        )


def is_frozen(layer: Layer) -> bool:
    """Whether no parameter of the layer requires a gradient."""
    return not any(parameter.requires_grad for parameter in layer.parameters())


def trains(parameter: Tensor) -> bool:
    """Whether a parameter moves, or has in this step: some loops switch a network off and on within a step.

    Zeros are no gradient. `zero_grad(set_to_none=False)` leaves them to what the user has closed, for good.
    """
    return parameter.requires_grad or (parameter.grad is not None and not _is_zero(parameter.grad))


def is_at_rest(layer: Layer) -> bool:
    """Whether the user holds a layer still, given that no controller has frozen it."""
    return not any(map(trains, layer.parameters()))


def _is_zero(gradient: Tensor) -> bool:
    """Whether a gradient is zero, as far as one process can tell."""
    if gradient.is_sparse:
        return not gradient._nnz()
    return not hasattr(gradient, "to_local") and not gradient.any()


def _modules_in(layer: Layer) -> list[nn.Module]:
    return [inner for module in layer.modules for inner in module.modules()]


def _unhold_all(modules: Iterable[nn.Module], model: nn.Module) -> None:
    users = _held_by_user(model)
    free = [module for module in list(modules) if unhold(module, None if module in users else model)]
    # A class with a `train` of its own may keep something that is not right in the other mode (DoRA keeps norms).
    special = [module for module in free if type(module).train is not nn.Module.train and module not in users]
    modes = [(module, module.training) for module in model.modules()] if special else []
    for module in special:
        module.train(module.training)
    for module, mode in modes:
        module.training = mode


def _held_by_user(model: nn.Module) -> set[nn.Module]:
    """Modules that do not follow `model.train()`: those with a `train` of the user's, and all inside them."""
    return {inner for module in model.modules() if users_train(module) is not None for inner in module.modules()}

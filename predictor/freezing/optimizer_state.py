"""What an optimizer has to find of a parameter that trains again, after its state was dropped.

Most make fresh state at a parameter's next step. Two do so earlier, for all parameters at once:

- SGD with momentum and `fused=True`, in the first step in which no parameter has any;
- Adagrad of the older PyTorch, when it is made.
"""

from collections.abc import Iterable

import torch
from torch.optim import SGD, Adagrad, Optimizer

from predictor.layers.layer import Layer


def begin_again(optimizers: Iterable[Optimizer], layers: Iterable[Layer]) -> None:
    """Give parameters without state what their optimizer begins with, where it would not make that itself."""
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in wanted and not optimizer.state.get(parameter):
                    _give_state(optimizer, group, parameter)


def _give_state(optimizer: Optimizer, group: dict[str, object], parameter: torch.nn.Parameter) -> None:
    if isinstance(optimizer, SGD):
        begun = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())
        if group.get("fused") and group["momentum"] and begun:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif isinstance(optimizer, Adagrad):
        state = Adagrad([parameter], **optimizer.defaults).state.get(parameter)
        if state:
            optimizer.state[parameter] = state

"""The freezable layers of a model, front to back. The head is never one of them."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from predictor.errors import UsageError

# Modules whose own parameters and those of their children are one weight.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True, eq=False)
class Layer:
    """What freezes together: modules in execution order, and the parameters that they hold."""

    name: str
    modules: tuple[nn.Module, ...]
    own: tuple[nn.Parameter, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's parameters, each once."""
        return iter(self.own)

    @property
    def size(self) -> int:
        """How many weights the layer holds."""
        return sum(parameter.numel() for parameter in self.own)


def layers_of(model: nn.Module, patterns: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """The layers of `model` that may freeze, in the order in which the model defines them.

    A layer starts at each module that holds a weight of two or more dimensions (convolution, linear, embedding,
    attention) and takes along what follows up to the next: normalization, activation, dropout. Normalization before
    the first weight goes to the first layer. A parameter that a container holds itself (class token, position
    embedding, layer scale) goes to the first layer inside that container. Modules that share a parameter are one layer.
    The last layer is the head and is left out, and so is everything tied to it.

    patterns: glob patterns over module names, one layer a pattern, front to back (`["stem*", "blocks.0*", ...]`), for
        those who want other layers. What no pattern names never freezes.

    Raises UsageError when fewer than two layers are found, or when a pattern matches nothing.
    """
    if patterns is not None:
        return _by_pattern(model, patterns)
    layers = _merge_tied(_weights_in_order(model))
    if len(layers) < 2:
        raise UsageError(
            f"{type(model).__name__} has {len(layers)} layer(s) with weights: freezing needs at least one before the "
            "head; pass layers=layers_of(model, patterns=[...]) to name them"
        )
    return tuple(layers[:-1])


def _weights_in_order(model: nn.Module) -> list[Layer]:
    names: list[str] = []
    modules: list[list[nn.Module]] = []
    waiting: list[nn.Module] = []
    for name, module in _leaves(model):
        if any(parameter.dim() >= 2 for parameter in module.parameters()):
            names.append(name)
            modules.append([*waiting, module])
            waiting = []
        elif modules:
            modules[-1].append(module)
        else:
            waiting.append(module)
    own = _parameters_of(model, modules)
    return [Layer(*row) for row in zip(names, map(tuple, modules), own, strict=True)]


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules without children, or that count as a whole, in the order of definition, each once."""
    seen: set[int] = set()
    stack = [(name, module)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = [] if isinstance(module, _WHOLE) else list(module.named_children())
        if not children:
            yield name, module
        stack += [(f"{name}.{child}" if name else child, part) for child, part in reversed(children)]


def _parameters_of(model: nn.Module, modules: list[list[nn.Module]]) -> list[tuple[nn.Parameter, ...]]:
    """The parameters of each layer: those of its modules, and those of containers that it comes first in."""
    place = {id(module): layer for layer, group in enumerate(modules) for module in group}
    own: list[dict[int, nn.Parameter]] = [{} for _ in modules]
    for module in model.modules():
        layer = place.get(id(module))
        if layer is None:
            layer = next((place[id(part)] for part in module.modules() if id(part) in place), None)
        if layer is not None:
            held = module.parameters() if id(module) in place else module.parameters(recurse=False)
            own[layer].update((id(parameter), parameter) for parameter in held)
    return [tuple(part.values()) for part in own]


def _merge_tied(layers: list[Layer]) -> list[Layer]:
    """Layers that share a parameter become one, at the place of the last: only there is the parameter done with."""
    merged: list[Layer] = []
    for layer in layers:
        ids = {id(parameter) for parameter in layer.own}
        tied = [earlier for earlier in merged if ids & {id(parameter) for parameter in earlier.own}]
        if tied:
            merged = [earlier for earlier in merged if earlier not in tied]
            parts = [*tied, layer]
            own = {id(parameter): parameter for part in parts for parameter in part.own}
            modules = tuple(module for part in parts for module in part.modules)
            layer = Layer("+".join(part.name for part in parts), modules, tuple(own.values()))
        merged.append(layer)
    return merged


def _by_pattern(model: nn.Module, patterns: Sequence[str]) -> tuple[Layer, ...]:
    layers, taken = [], set[int]()
    for pattern in patterns:
        modules = [module for name, module in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        own = {id(p): p for module in modules for p in module.parameters() if id(p) not in taken}
        if not own:
            raise UsageError(f"{pattern!r} names no module with parameters of its own: see model.named_modules()")
        taken |= own.keys()
        layers.append(Layer(pattern, tuple(modules), tuple(own.values())))
    return tuple(layers)

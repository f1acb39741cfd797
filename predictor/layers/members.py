"""What layers hold, by name, as a state keeps it: layers of the same names may hold other parameters.

Before a model's first pass its layers are in the order of definition. A norm may belong to another layer then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import Layer
from predictor.layers.parts import parts_of


def members_of(model: nn.Module, layers: Sequence[Layer]) -> list[dict[str, list[str]]]:
    """The names of each layer's parameters and modules in its model."""
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    return [
        {
            "parameters": [parameters[id(p)] for p in layer.own if id(p) in parameters],
            "modules": [modules[module] for module in layer.modules if module in modules],
        }
        for layer in layers
    ]


def may_be_of(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether a pass of the model may show layers with these names: by its parts."""
    parts = {part for name in parts_of(model).values() for part in name.split("+")}
    return parts.issuperset(part for name in names for part in name.split("+"))


def stored_layers(model: nn.Module, state: Mapping[str, Any]) -> tuple[Layer, ...] | None:
    """The layers that a controller's state is of; None where it does not say so, or the model has no such layers."""
    names, members = state["layers"], state.get("members", ())
    if len(members) != len(names) or not may_be_of(model, names):
        return None
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    try:
        return tuple(
            Layer(name, tuple(modules[m] for m in held["modules"]), tuple(parameters[p] for p in held["parameters"]))
            for name, held in zip(names, members, strict=True)
        )
    except KeyError:
        return None


def refuse_other_layers(model: nn.Module, layers: Sequence[Layer], state: Mapping[str, Any]) -> None:
    """Raise UsageError where a controller's state is of other layers, or of layers that hold other parameters."""
    names = [layer.name for layer in layers]
    if state["layers"] != names:
        odd = next((pair for pair in zip(state["layers"], names, strict=False) if pair[0] != pair[1]), None)
        raise UsageError(
            f"this state is of a model with {len(state['layers'])} layers, here are {len(names)}"
            + (f"; the first that differs: {odd[0]!r} there, {odd[1]!r} here" if odd else "")
        )
    here = {name: None for name, _ in model.named_parameters()} | _layer_of(names, members_of(model, layers))
    members = state.get("members", ()) if state["step"] else ()  # before, no pass may have shown where a norm belongs
    for name, there in _layer_of(names, members).items():
        if here.get(name, there) != there:
            raise UsageError(
                f"this state is of layers that hold other parameters: {name!r} belongs to {there!r} there, and to "
                f"{here[name] or 'no layer'!r} here: make the controller with the layers= of then, or without as then"
            )


def _layer_of(names: Sequence[str], members: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, str | None]:
    """The layer of each parameter, both by name."""
    return {name: layer for layer, held in zip(names, members, strict=False) for name in held["parameters"]}

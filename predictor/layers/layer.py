"""The freezable layers of a model, front to back. The head is never one of them."""

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from predictor.errors import UsageError
from predictor.layers.execution_order import ExecutionOrder, definition_order, traced_order
from predictor.layers.grouping import group_into_layers
from predictor.layers.model_hints import example_inputs
from predictor.layers.parts import parts_of, unwrapped


@dataclass(frozen=True, eq=False)
class Layer:
    """What freezes together: modules in execution order, and the parameters that they hold.

    Modules that contain others come first, the outermost before all. The last module is the one that computes last.
    """

    name: str
    modules: tuple[nn.Module, ...]
    own: tuple[nn.Parameter, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's parameters, each once."""
        return iter(self.own)

    @property
    def output(self) -> nn.Module:
        """The module whose output is taken for the layer's: the last one that holds parameters.

        A module after it may run in parallel, as a shortcut without parameters, or be called by other layers too.
        """
        holding = [module for module in self.modules if any(True for _ in module.parameters())]
        return (holding or self.modules)[-1]

    @property
    def size(self) -> int:
        """The number of weights in the layer."""
        return sum(parameter.numel() for parameter in self.own)


def layers_of(
    model: nn.Module,
    example: object = None,
    *,
    granularity: Literal["layer", "block"] = "layer",
    patterns: Sequence[str] | None = None,
) -> tuple[Layer, ...]:
    """The layers of `model` that may freeze, in the order in which its forward pass uses them.

    **The rule.** A layer starts where a module that holds a weight of two or more dimensions (convolution, linear,
    embedding, attention) is first used. All else goes to the layer before it: norms, activations, dropout, parameters
    that a container holds itself (class token, position embedding, layer scale, table of relative positions). What
    comes before the first layer goes to the first layer. So whatever is used before a layer belongs to the layers in
    front of it, and when those are frozen the backward pass ends there.

    **Used again.** The first use counts: while a parameter trains, the backward pass goes back to it. For the same
    reason modules that share a parameter are one layer, in the position of the first of them. Only a module without
    parameters that several layers call (one dropout for all) goes to the last of them: it stays on until all are
    frozen.

    **Never used** in the pass (auxiliary classifiers, which run only in training): a module and its parameters are left
    out and train on. A container's own parameter (a mask token) goes to the first layer inside that container.

    **The head** is left out, and so is everything tied to it. It is the module with weights that runs last; any other
    whose output leaves the model and feeds no weights; and what the model itself declares as its head (timm's
    `get_classifier`, Transformers' output embeddings and all modules behind the base model). A pooler inside the base
    model is pretrained, and a layer. With tied word embeddings the embedding trains on, and the backward pass never
    ends early.

    Names are those inside DDP and `torch.compile`. A model of timm or Transformers that cannot be run causes a warning.

    Args:
        model: the model, with or without what is wrapped around it.
        example: inputs to run `model` with once, on its device: a tensor, a tuple of inputs, or a dict of named ones.
            Afterwards the model, its buffers, modes and the random generators are as they were; its own hooks run.
            Without an example, a model of timm or Transformers runs on one small input that its configuration
            describes: their forward passes are known to change nothing, and that costs less than a training step. Any
            other model, and a sharded one, is not run; then the order of definition is taken for that of execution.
        granularity: "layer", or "block" for groups of layers: those that the model itself names (timm's
            `group_matcher`), or the items of its lists of modules (`encoder.layer.3`, `layer1.0`).
        patterns: glob patterns over module names, one layer a pattern, front to back (`["stem*", "blocks.0.*", ...]`).
            A module goes to the first pattern that matches it. What none matches never freezes.

    Raises:
        UsageError: there is no layer before the head; weights are not initialized yet; `model` cannot be called with
            `example`; a pattern matches nothing; nothing is left to train; or a layer shares a parameter with a module
            that no pattern matches.
    """
    model = unwrapped(model)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError(f"{type(model).__name__} has lazy modules without weights yet: call it with a batch first")
    if granularity not in ("layer", "block"):
        raise UsageError(f'granularity={granularity!r}: give "layer" or "block"')
    if patterns is not None:
        if example is not None or granularity == "block":
            raise UsageError("patterns name the layers and their order: leave out example and granularity")
        return _by_pattern(model, patterns)
    parts = parts_of(model)
    groups = group_into_layers(model, parts, _order_of(model, parts, example), blocks=granularity == "block")
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no layer with weights but its head and what is tied to it: freezing needs at "
            "least one before the head; pass layers=layers_of(model, patterns=[...]) to name them"
        )
    return tuple(Layer(group.name, group.modules, group.parameters) for group in groups)


def _order_of(model: nn.Module, parts: Iterable[nn.Module], example: object) -> ExecutionOrder:
    if example is not None:
        try:
            return traced_order(model, parts, example)
        except Exception as error:
            raise UsageError(
                f"{type(model).__name__} cannot be called with this example ({type(error).__name__}: {error}): give a "
                "tensor, a tuple of inputs or a dict of named ones, on the model's device"
            ) from error
    fault: Exception | None = None
    for own in example_inputs(model):
        try:
            return traced_order(model, parts, own)
        except Exception as error:
            fault = error
    if fault is not None:
        # Not silent: layers in the wrong order cost no accuracy, but freezing them may save nothing.
        warnings.warn(
            f"{type(model).__name__} could not be run to see in which order its layers run ({type(fault).__name__}: "
            f"{fault}); they are in the order of definition. Pass layers=layers_of(model, example)",
            stacklevel=3,
        )
    return definition_order(model, parts)


def _by_pattern(model: nn.Module, patterns: Sequence[str]) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    parameters, modules, named_by_any = set[int](), set[nn.Module](), set[nn.Module]()
    for pattern in patterns:
        named = [m for name, m in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        parts = dict.fromkeys(part for module in named for part in module.modules())
        inside = [part for part in parts if modules.isdisjoint(part.modules())]
        own = {id(p): p for module in named for p in module.parameters() if id(p) not in parameters}
        if not own:
            raise UsageError(
                f"{pattern!r} names no module with parameters that no pattern before it has named: see "
                "model.named_modules()"
            )
        parameters |= own.keys()
        modules.update(inside)
        named_by_any.update(parts)
        layers.append(Layer(pattern, tuple(inside), tuple(own.values())))
    if all(id(parameter) in parameters for parameter in model.parameters()):
        raise UsageError("the patterns name all of the model: leave out its head, which has to train on")
    _refuse_shared(model, layers, named_by_any)
    return tuple(layers)


def _refuse_shared(model: nn.Module, layers: Sequence[Layer], named: set[nn.Module]) -> None:
    """What no pattern names must never freeze, so it may share no weight with a layer, such as a tied head's."""
    layer_of = {id(parameter): layer.name for layer in layers for parameter in layer.parameters()}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if module not in named and id(parameter) in layer_of:
                sharer = name or type(model).__name__
                raise UsageError(
                    f"{layer_of[id(parameter)]!r} shares a parameter with {sharer!r} ({own}), which no pattern names: "
                    "leave that layer out, or name both"
                )

"""The freezable layers of a model, front to back. The head is never one of them."""

import fnmatch
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from predictor.errors import UsageError
from predictor.layers.execution_order import ExecutionOrder, definition_order, traced_order
from predictor.layers.grouping import ends_of_networks, group_into_layers
from predictor.layers.model_hints import example_inputs
from predictor.layers.parts import holds_weight, parts_of, unwrapped


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
    head: str | Sequence[str] | None = None,
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
    whose output leaves the model, or is detached, and feeds no weights; and what the model itself declares as its head
    (timm's `get_classifier`, Transformers' output embeddings and all modules behind the base model). A pooler inside
    the base model is pretrained, and a layer. With tied word embeddings the embedding trains on, and the backward pass
    never ends early. Where nothing in the head trains, as in a language model with adapters, the last layer that
    trains is left out too. Where `head` is given, it is that and nothing else.

    **Adapters** (peft's LoRA and the like) form one layer with the layer that they are added to. The layers without
    adapters, which do not train, stay in the list.

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
        head: names of the modules that are the head, or glob patterns over them.

    Raises:
        UsageError: there is no layer before the head; `head` names no module with weights that is used; weights are not
            initialized yet; `model` cannot be called with `example`; a pattern matches nothing; nothing is left to
            train; or a layer shares a parameter with a module that no pattern matches.
    """
    model = unwrapped(model)
    _refuse_lazy(model)
    if granularity not in ("layer", "block"):
        raise UsageError(f'granularity={granularity!r}: give "layer" or "block"')
    if patterns is not None:
        if example is not None or granularity == "block" or head is not None:
            raise UsageError("patterns name the layers and their order: leave out example, granularity and head")
        return _by_pattern(model, patterns)
    order, _ = _order_of(model, parts_of(model), example)
    return layers_in_order(model, order, granularity == "block", _named_heads(model, order, head))


def first_layers(model: nn.Module, optimizers: Iterable[Optimizer]) -> tuple[tuple[Layer, ...], bool]:
    """The layers of `layers_of(model)`, and whether they are final; else they are in the order of definition.

    A sharded model's are final: all processes would have to run it together.

    Args:
        model: the model, with or without what is wrapped around it.
        optimizers: those of the training. The last layer of each that has a network of its own is a head.

    Raises:
        UsageError: as `layers_of`.
    """
    model = unwrapped(model)
    _refuse_lazy(model)
    order, seen = _order_of(model, parts_of(model), None)
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return layers_in_order(model, with_networks_ends(model, order, optimizers)), seen or sharded


def with_networks_ends(model: nn.Module, order: ExecutionOrder, optimizers: Iterable[Optimizer]) -> ExecutionOrder:
    """The order, with the last part of each optimizer's own network among the ends."""
    held = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    return replace(order, ends=order.ends | ends_of_networks(model, order, held))


def layers_in_order(
    model: nn.Module,
    order: ExecutionOrder,
    blocks: bool = False,
    heads: Collection[nn.Module] = (),
    ours: Collection[int] = (),
) -> tuple[Layer, ...]:
    """The layers that a model has if it uses its parts in this order.

    Args:
        model: the model itself.
        order: when its parts are used.
        blocks: whether all layers of one block form one layer.
        heads: those that the user has named.
        ours: ids of parameters that the user does not hold still, though they may be frozen now.

    Raises:
        UsageError: there is no layer before the head.
    """
    groups = group_into_layers(model, parts_of(model), order, blocks, heads, ours)
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no layer with weights but its head and what is tied to it: freezing needs at "
            "least one before the head; name the head with layers=layers_of(model, head=...)"
        )
    return tuple(Layer(group.name, group.modules, group.parameters) for group in groups)


def _refuse_lazy(model: nn.Module) -> None:
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError(f"{type(model).__name__} has lazy modules without weights yet: call it with a batch first")


def _named_heads(model: nn.Module, order: ExecutionOrder, head: str | Sequence[str] | None) -> list[nn.Module]:
    patterns = [] if head is None else [head] if isinstance(head, str) else [*head]
    found: list[nn.Module] = []
    for pattern in patterns:
        named = [module for name, module in model.named_modules() if name and fnmatch.fnmatchcase(name, pattern)]
        if not any(part in order.first and holds_weight(part) for module in named for part in module.modules()):
            raise UsageError(f"head={pattern!r} names no module with weights that is used: see model.named_modules()")
        found += named
    if head is not None and not found:
        raise UsageError(f"head={head!r}: give the names of the modules that are the head, from model.named_modules()")
    return found


def _order_of(model: nn.Module, parts: Iterable[nn.Module], example: object) -> tuple[ExecutionOrder, bool]:
    """The order, and whether it was seen in a pass."""
    if example is not None:
        try:
            return traced_order(model, parts, example), True
        except Exception as error:
            raise UsageError(
                f"{type(model).__name__} cannot be called with this example ({type(error).__name__}: {error}): give a "
                "tensor, a tuple of inputs or a dict of named ones, on the model's device"
            ) from error
    fault: Exception | None = None
    for own in example_inputs(model):
        try:
            return traced_order(model, parts, own), True
        except Exception as error:
            fault = error
    if fault is not None:
        # Not silent: layers in the wrong order cost no accuracy, but freezing them may save nothing.
        warnings.warn(
            f"{type(model).__name__} could not be run to see in which order its layers run ({type(fault).__name__}: "
            f"{fault}); they are in the order of definition. Pass layers=layers_of(model, example)",
            stacklevel=4,
        )
    return definition_order(model, parts), False


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

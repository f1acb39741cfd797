"""The freezable layers of a model, front to back. The head is never one of them."""

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from predictor.errors import UsageError
from predictor.layers.execution_order import Order, definition_order, traced_order
from predictor.layers.grouping import grouped
from predictor.layers.model_hints import own_examples
from predictor.layers.parts import parts_of, unwrapped


@dataclass(frozen=True, eq=False)
class Layer:
    """What freezes together: modules in execution order, and the parameters that they hold.

    Modules that contain others come first, the outermost foremost; the last module is the one that computes last.
    """

    name: str
    modules: tuple[nn.Module, ...]
    own: tuple[nn.Parameter, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's parameters, each once."""
        return iter(self.own)

    @property
    def output(self) -> nn.Module:
        """The module whose output stands for the layer's: the last that holds parameters.

        What comes after it may stand beside it, as a shortcut without parameters, or be called by others too.
        """
        holding = [module for module in self.modules if any(True for _ in module.parameters())]
        return (holding or self.modules)[-1]

    @property
    def size(self) -> int:
        """How many weights the layer holds."""
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
    comes before the first goes to the first. So whatever is used before a layer belongs to the layers in front of it,
    and when those are frozen the backward pass ends there.

    **Used again.** The first use counts: while a parameter trains, the backward pass goes back to there. For the same
    reason modules that share a parameter are one layer, at the index of the first of them. Only a module without
    parameters that several layers call (one dropout for all) goes to the last: it stays on until all are frozen.

    **Never used** in the pass (auxiliary classifiers, which run in training alone): a module and its parameters are
    left out and train on; a container's own parameter (a mask token) goes to the first layer inside that container.

    **The head** is left out, and so is everything tied to it: the module with weights that runs last; any other whose
    output leaves the model and feeds no weights; and what the model itself says is its head (timm's `get_classifier`,
    Transformers' output embeddings and all that it puts behind its base model). A pooler inside the base model is
    pretrained, and a layer. With tied word embeddings the embedding trains on, and the backward pass never ends early.

    example: inputs to run `model` with once, on its device: a tensor, a tuple of inputs, or a dict of named ones.
        The model, its buffers, modes and the random generators are afterwards as they were; its own hooks run. Without
        one, a model of timm or Transformers runs on one small input that its configuration describes: the forward
        passes of both are known to change nothing, and that costs less than a training step. Any other model does not
        run unasked, nor does one that is sharded: then the order of definition is taken for that of execution.
    granularity: "layer", or "block" for groups of them: those that the model itself names (timm's `group_matcher`),
        or what stands in its lists of modules (`encoder.layer.3`, `layer1.0`).
    patterns: glob patterns over module names, one layer a pattern, front to back (`["stem*", "blocks.0.*", ...]`), for
        those who want other layers. A module goes to the first that names it; what none names never freezes.

    Names are those inside DDP and `torch.compile`. Warns when a model of timm or Transformers cannot be run. Raises
    UsageError when there is no layer before the head, when weights are not made yet, when `model` cannot be called with
    `example`, and when a pattern matches nothing, nothing is left to train, or a layer shares a parameter with what is.
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
    groups = grouped(model, parts, _order_of(model, parts, example), blocks=granularity == "block")
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no layer with weights but its head and what is tied to it: freezing needs at "
            "least one before the head; pass layers=layers_of(model, patterns=[...]) to name them"
        )
    return tuple(Layer(group.name, group.modules, group.parameters) for group in groups)


def _order_of(model: nn.Module, parts: Iterable[nn.Module], example: object) -> Order:
    if example is not None:
        try:
            return traced_order(model, parts, example)
        except Exception as error:
            raise UsageError(
                f"{type(model).__name__} cannot be called with this example ({type(error).__name__}: {error}): give a "
                "tensor, a tuple of inputs or a dict of named ones, on the model's device"
            ) from error
    fault: Exception | None = None
    for own in own_examples(model):
        try:
            return traced_order(model, parts, own)
        except Exception as error:
            fault = error
    if fault is not None:
        # Not silent: layers out of order cost no accuracy, but they may save nothing.
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
    """What no pattern names never freezes: nor does a weight that it shares with a layer, such as a tied head's."""
    home = {id(parameter): layer.name for layer in layers for parameter in layer.parameters()}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if module not in named and id(parameter) in home:
                sharer = name or type(model).__name__
                raise UsageError(
                    f"{home[id(parameter)]!r} shares a parameter with {sharer!r} ({own}), which no pattern names: "
                    "leave that layer out, or name both"
                )

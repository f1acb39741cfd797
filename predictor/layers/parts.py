"""A model's parts: the smallest modules that freeze as a whole."""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# Modules that use their children's parameters themselves, as norms, attention and quantization-aware convolutions do: a
# child of them is no part.
_WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_NORMS, *_MATRICES)
# They have no children and are never called: their parameters belong to their owner.
_HOLDERS = (nn.ParameterList, nn.ParameterDict)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DDP and DataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # its class comes with a slow import
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """The parts, each once, with their names, in the order of definition.

    A part is a module without children, or one that uses its children's parameters itself: attention of torch.nn, a
    recurrent layer, a norm, a module with parametrized weights, a layer with adapters (LoRA and the like).
    """
    return {module: name for name, module in _leaves(model)}


def has_adapters(module: nn.Module) -> bool:
    """Whether a module wraps a layer and adds adapters to it, as peft's do: it is one part, with the wrapped layer."""
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def _adapters_of(module: nn.Module) -> list[str]:
    """The names of what holds a part's adapters, such as lora_A and lora_B. They are named with the part."""
    if not has_adapters(module):
        return []
    children = (child for child in module.named_children() if child[0] != "base_layer")
    return [name for name, child in children if any(True for _ in child.parameters())]


def holds_weight(part: nn.Module) -> bool:
    """Whether a part holds a weight of two or more dimensions, and so starts a layer.

    A norm holds none, whatever its parameters' shape. Nor does a scale or shift with one number a channel, such as
    (1, 1, C) in ResMLP.
    """
    if isinstance(part, _NORMS):
        return False
    shapes = [parameter.shape for parameter in part.parameters()]
    if isinstance(part, _MATRICES):
        return any(len(shape) >= 2 for shape in shapes)
    return any(sum(extent != 1 for extent in shape) >= 2 for shape in shapes)


def block_names(model: nn.Module, starts: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """The name of the block that each part in `starts` (part -> its name) belongs to.

    A module that groups its own parameters (timm's `group_matcher`) decides, by its stages rather than their blocks.
    Otherwise a block is an item of a list (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`), such as
    `encoder.layer.3` and `layer1.0`; lists within lists are opened. Outside of lists a block is the largest module with
    at most a quarter of all the parts in `starts`, such as `embeddings` and `Mixed_5b`. A module with more than half of
    them is always opened: it is a model within a model.
    """
    blocks: dict[nn.Module, str] = {}
    _split(model, "", starts, blocks, in_list=False, most=len(starts) / 4)
    return blocks


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        whole = isinstance(module, _WHOLE) or is_parametrized(module) or has_adapters(module)
        children = [] if whole else list(module.named_children())
        if not children and not isinstance(module, _HOLDERS):
            yield "+".join([name, *_adapters_of(module)]), module
        stack += [(f"{name}.{child}" if name else child, part) for child, part in reversed(children)]


def _split(
    module: nn.Module, name: str, starts: dict[nn.Module, str], blocks: dict[nn.Module, str], in_list: bool, most: float
) -> None:
    inside = {part: starts[part] for part in module.modules() if part in starts and part not in blocks}
    is_list = isinstance(module, _LISTS)
    if not inside:
        return
    if grouped := _own_groups(module, inside):
        blocks.update(grouped)
    elif module in starts or (name and not is_list and len(inside) <= most * (1 + in_list)):
        blocks.update(dict.fromkeys(inside, name))
    else:
        for child, part in module.named_children():
            _split(part, f"{name}.{child}" if name else child, starts, blocks, is_list, most)


def _own_groups(module: Any, inside: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """The blocks of a module that has its own grouping."""
    if not hasattr(module, "group_matcher"):
        return {}
    from timm.models import group_parameters

    try:
        numbers = group_parameters(module, module.group_matcher(coarse=True), reverse=True)
    except (AssertionError, NotImplementedError):  # RDNet, for example, has no stages
        numbers = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    number_of_parameter = {id(parameter): numbers[name] for name, parameter in module.named_parameters()}
    number_of = {path: number_of_parameter[id(next(part.parameters()))] for part, path in inside.items()}
    first_of = {number: path for path, number in reversed(number_of.items())}
    name_of = {number: _name_prefix(path, number_of) for number, path in first_of.items()}
    return {part: name_of[number_of[path]] for part, path in inside.items()}


def _name_prefix(path: str, number_of: dict[str, int]) -> str:
    """The shortest prefix of a part's name that no other group shares: "layer1" of "layer1.0.conv1"."""
    others = [f"{other}." for other, number in number_of.items() if number != number_of[path]]
    components = path.split(".")
    prefixes = (".".join(components[:length]) for length in range(1, len(components)))
    return next((name for name in prefixes if not any(o.startswith(f"{name}.") for o in others)), path)

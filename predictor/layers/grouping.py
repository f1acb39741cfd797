"""The rule that puts every part and parameter of a model into a layer, or into none."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from predictor.layers.execution_order import ExecutionOrder
from predictor.layers.model_hints import declared_heads
from predictor.layers.parts import block_names, holds_weight

_HEAD = -1
"""Stands for what is no layer: the head and what is tied to it."""


@dataclass(frozen=True)
class Group:
    """The modules and parameters of one layer."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]


def group_into_layers(
    model: nn.Module,
    parts: dict[nn.Module, str],
    order: ExecutionOrder,
    blocks: bool,
    named: Collection[nn.Module] = (),
    ours: Collection[int] = (),
) -> list[Group]:
    """The layers of `model`, front to back, by the rule that `layers_of` states. Empty where there is none.

    Args:
        model: the model.
        parts: the names of its parts, in the order of definition.
        order: when the parts are used.
        blocks: whether all layers of one block form one layer.
        named: the heads. By default what is seen to be one, or declared by the model.
        ours: ids of parameters that the user does not hold still, though they may be frozen now.
    """
    starts = sorted(filter(holds_weight, order.first), key=order.first.__getitem__)
    declared = {p for head in named or declared_heads(model) for p in head.modules() if p in order.first}
    heads = declared.intersection(starts)
    if not named:
        heads |= {*sorted(starts, key=order.last.__getitem__)[-1:], *order.ends}
    training = [part for part in starts if any(p.requires_grad or id(p) in ours for p in part.parameters())]
    if heads.isdisjoint(training):
        heads |= {*sorted(training, key=order.last.__getitem__)[-1:]}
    tied = _tied(starts)
    groups = [group for group in tied if heads.isdisjoint(group)]
    if not groups:
        return []
    names = ["+".join(parts[part] for part in group) for group in groups]
    if blocks:
        block_of = block_names(model, {part: parts[part] for part in starts})
        names = [block_of[group[0]] for group in groups]
    layers = list(dict.fromkeys(names))
    index_of = {part: layers.index(name) for name, group in zip(names, groups, strict=True) for part in group}
    # The head begins where it computes the outputs, not where a part that is tied to it computes.
    ends = [max(order.last[part] for part in heads.intersection(group)) for group in tied if group not in groups]
    timeline = _Timeline(
        [*((order.first[group[0]], index_of[group[0]]) for group in groups), *((end, _HEAD) for end in ends)]
    )
    index_of_part = _assign_parts(model, parts, order, timeline, dict.fromkeys([*starts, *declared], _HEAD) | index_of)
    index_of_parameter = _assign_parameters(model, order, timeline, index_of_part)
    modules = _modules_of(model, parts, order, index_of_part, index_of_parameter, len(layers))
    return [
        Group(name, tuple(modules[index]), tuple(p for p in model.parameters() if index_of_parameter[id(p)] == index))
        for index, name in enumerate(layers)
    ]


def ends_of_networks(
    model: nn.Module, order: ExecutionOrder, held: Sequence[Collection[nn.Parameter]]
) -> frozenset[nn.Module]:
    """The last part of each network that has an optimizer of its own, such as a generator and its discriminator.

    Two optimizers that share the work within a network, as one for matrices and one for the rest, have none.

    Args:
        model: the model.
        order: when its parts are used.
        held: the parameters of each optimizer.
    """
    if len(held) < 2:
        return frozenset()
    ids = [{id(parameter) for parameter in each} for each in held]
    networks = networks_in(model)
    owned = [{net for net in networks if any(id(p) in own for p in net.parameters())} for own in ids]
    ends = set()
    for index, own in enumerate(ids):
        others = set[nn.Module]().union(*(nets for number, nets in enumerate(owned) if number != index))
        last = [part for part in order.last if holds_weight(part) and any(id(p) in own for p in part.parameters())]
        if last and owned[index].isdisjoint(others):
            ends.add(max(last, key=order.last.__getitem__))
    return frozenset(ends)


def networks_in(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters that a model is made of, at the topmost level at which there are several."""
    while True:
        children = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(children) != 1 or any(True for _ in model.parameters(recurse=False)):
            return children
        (model,) = children


def _tied(starts: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Parts with weights in groups that share a parameter, each group in the position of its first part.

    Not of its last: while a parameter trains, the backward pass goes back to its first use.
    """
    group_of = {part: [part] for part in starts}
    holder_of: dict[int, nn.Module] = {}
    for part in starts:
        for parameter in part.parameters():
            group, other = group_of[part], group_of[holder_of.setdefault(id(parameter), part)]
            if other is not group:
                other += group
                group_of.update(dict.fromkeys(group, other))
    return [group for part, group in group_of.items() if group[0] is part]


class _Timeline:
    """Finds the layer, or the head, to which something belongs that is used at a given moment."""

    def __init__(self, begins: Iterable[tuple[int, int]]) -> None:
        self._moments, self._indices = zip(*sorted(begins), strict=True)
        self._first = next(index for index in self._indices if index != _HEAD)

    def at(self, moment: int) -> int:
        """The index of the last layer that began before `moment`; of the first layer where none did."""
        after = bisect_right(self._moments, moment)
        return int(self._indices[after - 1] if after else self._first)


def _assign_parts(
    model: nn.Module,
    parts: Iterable[nn.Module],
    order: ExecutionOrder,
    timeline: _Timeline,
    fixed: dict[nn.Module, int],
) -> dict[nn.Module, int]:
    """The layer index of every part, without unused parts that hold parameters or are in a network of such alone.

    Args:
        model: the model.
        parts: its parts, in the order of definition.
        order: when they are used.
        timeline: when layers begin.
        fixed: indices that are known.
    """
    index_of_part = dict(fixed)
    unused = _in_unused_networks(model, order)
    before = 0
    for part in parts:
        bare = not any(True for _ in part.parameters())
        if part in order.first:
            index_of_part.setdefault(part, timeline.at(order.last[part] if bare else order.first[part]))
        elif bare and part not in unused:
            index_of_part[part] = before
        before = index_of_part.get(part, before)
    return index_of_part


def _in_unused_networks(model: nn.Module, order: ExecutionOrder) -> set[nn.Module]:
    """What is inside modules that hold parameters and of which nothing is used, such as a teacher's dropout."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if any(True for _ in module.parameters()) and order.first.keys().isdisjoint(module.modules()):
            found.update(module.modules())
    return found


def _assign_parameters(
    model: nn.Module, order: ExecutionOrder, timeline: _Timeline, index_of_part: dict[nn.Module, int]
) -> dict[int, int | None]:
    """The layer index of every parameter, by its id; None for parameters that are never used."""
    indices: dict[int, int | None] = {}
    for part, index in sorted(index_of_part.items(), key=lambda item: not holds_weight(item[0])):
        for parameter in part.parameters():
            indices.setdefault(id(parameter), index)
    for module in model.modules():
        inside = [order.first[part] for part in module.modules() if part in order.first]
        for parameter in module.parameters(recurse=False):
            moment = order.parameters.get(id(parameter), min(inside, default=None))
            indices.setdefault(id(parameter), None if moment is None else timeline.at(moment))
    return indices


def _modules_of(
    model: nn.Module,
    parts: dict[nn.Module, str],
    order: ExecutionOrder,
    index_of_part: dict[nn.Module, int],
    index_of_parameter: dict[int, int | None],
    layers: int,
) -> list[list[nn.Module]]:
    """Each layer's modules: containers that hold nothing of another layer, then the parts in the order of use."""
    modules: list[list[nn.Module]] = [[] for _ in range(layers)]
    for module in model.modules():
        if module in parts or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        inside: set[int | None] = {index_of_part.get(part) for part in module.modules() if part in parts}
        inside |= {index_of_parameter[id(parameter)] for parameter in module.parameters()}
        index = inside.pop() if len(inside) == 1 else None
        if index is not None and index != _HEAD:
            modules[index].append(module)
    for part in sorted(index_of_part, key=lambda part: order.first.get(part, -1)):
        if index_of_part[part] != _HEAD:
            modules[index_of_part[part]].append(part)
    return modules

"""The rule that puts every part and parameter of a model into a layer, or into none."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from predictor.layers.execution_order import Order
from predictor.layers.model_hints import declared_heads
from predictor.layers.parts import block_names, holds_weight

_HEAD = -1
"""The index of what is no layer: the head and what is tied to it."""


@dataclass(frozen=True)
class Group:
    """What makes a layer."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]


def grouped(model: nn.Module, parts: dict[nn.Module, str], order: Order, blocks: bool) -> list[Group]:
    """The layers of `model`, front to back, by the rule that `layers_of` states. Empty where there is none.

    parts: names of the model's parts, in the order of definition. blocks: whether layers of one block are one.
    """
    starts = sorted(filter(holds_weight, order.first), key=order.first.__getitem__)
    declared = {part for head in declared_heads(model) for part in head.modules() if part in order.first}
    heads = {*sorted(starts, key=order.last.__getitem__)[-1:], *order.ends, *declared.intersection(starts)}
    tied = _tied(starts)
    teams = [team for team in tied if heads.isdisjoint(team)]
    if not teams:
        return []
    names = ["+".join(parts[part] for part in team) for team in teams]
    if blocks:
        block_of = block_names(model, {part: parts[part] for part in starts})
        names = [block_of[team[0]] for team in teams]
    layers = list(dict.fromkeys(names))
    indices = {part: layers.index(name) for name, team in zip(names, teams, strict=True) for part in team}
    # The head begins where it computes the outputs, not where something tied to it computes.
    ends = [max(order.last[part] for part in heads.intersection(team)) for team in tied if team not in teams]
    timeline = _Timeline(
        [*((order.first[team[0]], indices[team[0]]) for team in teams), *((end, _HEAD) for end in ends)]
    )
    home_of = _parts_at_home(parts, order, timeline, dict.fromkeys([*starts, *declared], _HEAD) | indices)
    home_of_parameter = _parameters_at_home(model, order, timeline, home_of)
    modules = _modules_of(model, parts, order, home_of, home_of_parameter, len(layers))
    return [
        Group(name, tuple(modules[index]), tuple(p for p in model.parameters() if home_of_parameter[id(p)] == index))
        for index, name in enumerate(layers)
    ]


def _tied(starts: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Parts with weights, those that share a parameter together, at the index of the first of them.

    Not of the last: while a parameter trains, the backward pass goes back to its first use.
    """
    team_of = {part: [part] for part in starts}
    holder_of: dict[int, nn.Module] = {}
    for part in starts:
        for parameter in part.parameters():
            team, other = team_of[part], team_of[holder_of.setdefault(id(parameter), part)]
            if other is not team:
                other += team
                team_of.update(dict.fromkeys(team, other))
    return [team for part, team in team_of.items() if team[0] is part]


class _Timeline:
    """Which layer, or the head, what is used at a moment belongs to."""

    def __init__(self, begins: Iterable[tuple[int, int]]) -> None:
        self._moments, self._indices = zip(*sorted(begins), strict=True)
        self._front = next(index for index in self._indices if index != _HEAD)

    def at(self, moment: int) -> int:
        """The index of the layer that has begun last before `moment`; that of the first where none has."""
        after = bisect_right(self._moments, moment)
        return int(self._indices[after - 1] if after else self._front)


def _parts_at_home(
    parts: Iterable[nn.Module], order: Order, timeline: _Timeline, known: dict[nn.Module, int]
) -> dict[nn.Module, int]:
    """The index of every part, those with parameters that are never used left out. known: indices that stand."""
    home_of = dict(known)
    before = 0
    for part in parts:
        bare = not any(True for _ in part.parameters())
        if part in order.first:
            home_of.setdefault(part, timeline.at(order.last[part] if bare else order.first[part]))
        elif bare:
            home_of[part] = before
        before = home_of.get(part, before)
    return home_of


def _parameters_at_home(
    model: nn.Module, order: Order, timeline: _Timeline, home_of: dict[nn.Module, int]
) -> dict[int, int | None]:
    """The index of every parameter, by its id; None for those that are never used."""
    indices: dict[int, int | None] = {}
    for part, index in sorted(home_of.items(), key=lambda item: not holds_weight(item[0])):
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
    order: Order,
    home_of: dict[nn.Module, int],
    home_of_parameter: dict[int, int | None],
    layers: int,
) -> list[list[nn.Module]]:
    """Each layer's modules: containers that hold nothing of another layer, then the parts as they are used."""
    modules: list[list[nn.Module]] = [[] for _ in range(layers)]
    for module in model.modules():
        if module in parts or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        inside: set[int | None] = {home_of.get(part) for part in module.modules() if part in parts}
        inside |= {home_of_parameter[id(parameter)] for parameter in module.parameters()}
        index = inside.pop() if len(inside) == 1 else None
        if index is not None and index != _HEAD:
            modules[index].append(module)
    for part in sorted(home_of, key=lambda part: order.first.get(part, -1)):
        if home_of[part] != _HEAD:
            modules[home_of[part]].append(part)
    return modules

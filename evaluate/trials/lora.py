"""LoRA: a workload whose layers are fixed and train through low-rank adapters, for comparison with freezing."""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor, nn

from collect.workloads import Workload
from data.sources.base import Source
from predictor.errors import UsageError
from predictor.freezing.freeze import freeze
from predictor.layers.layer import Layer, layers_of
from predictor.layers.parts import holds_weight, parts_of


def with_lora(workload: Workload, rank: int) -> Workload:
    """The workload with LoRA adapters of this rank, the work of the peft package, in place of trained layers.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). Every linear layer and every convolution
    without groups gets an adapter, scaled by alpha / rank with alpha = 2 * rank, without dropout of its own; the head,
    as `layers_of` finds it, is trained in full, and all else stands still. BatchNorm keeps the statistics that the
    model came with and normalizes with them, as in a frozen layer: in training mode it would move them, though the
    weights that they belong to stand still. Dropout of the model stays on, since adapters train in every layer.

    Raises UsageError when peft is missing; the model's function raises it for a model without such layers.
    """
    if find_spec("peft") is None:
        raise UsageError("LoRA needs the package peft: pip install .[finetune]")
    return replace(workload, model=lambda source: _adapted(workload.model, source, rank))


class _Holder(nn.Module):
    """Gives all modules' names a beginning that occurs nowhere else: peft finds the head by the end of its name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.adapted_model = model

    def forward(self, inputs: Tensor) -> Tensor:
        logits_BC: Tensor = self.adapted_model(inputs)
        return logits_BC


def _adapted(build: Callable[[Source], nn.Module], source: Source, rank: int) -> nn.Module:
    model = _Holder(build(source))
    head = _head(model, source)
    body = {name: part for part, name in parts_of(model).items() if name not in head}
    targets = [name for name, part in body.items() if _can_adapt(part)]
    if not targets:
        raise UsageError("this model has no linear layer and no convolution without groups before its head: no LoRA")
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="|".join(map(re.escape, targets)),
        modules_to_save=head,
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    norms = [part for part in body.values() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    freeze(Layer("BatchNorm", tuple(norms), ()))
    return adapted


def _head(model: nn.Module, source: Source) -> list[str]:
    """Names of the parts with weights that belong to no layer."""
    inside = {id(parameter) for layer in layers_of(model, source.probe(2)) for parameter in layer.parameters()}
    outside = [part for part in parts_of(model) if inside.isdisjoint(map(id, part.parameters()))]
    return [name for part, name in parts_of(model).items() if part in outside and holds_weight(part)]


def _can_adapt(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)

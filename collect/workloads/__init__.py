"""The workloads: a model, a source and a recipe under one name, or the user's own package.module:function."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from collect.workloads import (
    convnext,
    densenet,
    finetune_images,
    finetune_text,
    mixer,
    mlp,
    mobilenet,
    paper,
    resnet,
    textcnn,
    texttransformer,
    transfer,
    vgg,
    vit,
)
from collect.workloads.recipe import Recipe, Workload
from data.sources.text import GLUE
from predictor.errors import UsageError
from predictor.shared.user_code import code_of, named

__all__ = ["WORKLOADS", "Recipe", "Workload", "load_workload", "own_code"]

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp-fashion": mlp.mlp_fashion,
    "vgg-fashion": vgg.vgg_fashion,
    "resnet8-fashion": resnet.resnet8_fashion,
    "resnet14-fashion": resnet.resnet14_fashion,
    "resnet20-fashion": resnet.resnet20_fashion,
    "mobilenet-fashion": mobilenet.mobilenet_fashion,
    "densenet-fashion": densenet.densenet_fashion,
    "mixer-fashion": mixer.mixer_fashion,
    "convnext-fashion": convnext.convnext_fashion,
    "vit-fashion": vit.vit_fashion,
    "textcnn-glosses": textcnn.textcnn_glosses,
    "texttransformer-glosses": texttransformer.texttransformer_glosses,
    "mlp-digits": mlp.mlp_digits,
    "vgg-digits": vgg.vgg_digits,
    "resnet8-digits": resnet.resnet8_digits,
    "mobilenet-digits": mobilenet.mobilenet_digits,
    "densenet-digits": densenet.densenet_digits,
    "mixer-digits": mixer.mixer_digits,
    "convnext-digits": convnext.convnext_digits,
    "vit-digits": vit.vit_digits,
    **{f"{name}-first": partial(transfer.first, name) for name in transfer.TRANSFERS},
    **{f"{name}-transfer": partial(transfer.transfer, name) for name in transfer.TRANSFERS},
    "lite0-fashion": partial(finetune_images.lite, 0, "fashion"),
    "lite1-fashion": partial(finetune_images.lite, 1, "fashion"),
    "lite2-fashion": partial(finetune_images.lite, 2, "fashion"),
    "lite0-mnist": partial(finetune_images.lite, 0, "mnist"),
    "lite1-mnist": partial(finetune_images.lite, 1, "mnist"),
    "lite2-mnist": partial(finetune_images.lite, 2, "mnist"),
    "minilm-glosses": finetune_text.minilm_glosses,
    **{f"bert-base-{task}": partial(finetune_text.bert_base, task) for task in GLUE},
    "deit-small-cifar10": partial(finetune_images.deit_small, "cifar10"),
    "deit-small-cifar100": partial(finetune_images.deit_small, "cifar100"),
    "resnet56-cifar10": partial(paper.on_cifar, "resnet56", "cifar10"),
    "resnet56-cifar100": partial(paper.on_cifar, "resnet56", "cifar100"),
    "resnet50-cifar10": partial(paper.on_cifar, "resnet50", "cifar10"),
    "resnet50-cifar100": partial(paper.on_cifar, "resnet50", "cifar100"),
    "resnet50-imagefolder": partial(paper.on_folder, "resnet50"),
    "vgg11-cifar10": partial(paper.on_cifar, "vgg11", "cifar10"),
    "vgg11-cifar100": partial(paper.on_cifar, "vgg11", "cifar100"),
    "vgg11-imagefolder": partial(paper.on_folder, "vgg11"),
    "mobilenetv2-cifar10": partial(paper.on_cifar, "mobilenetv2", "cifar10"),
    "mobilenetv2-cifar100": partial(paper.on_cifar, "mobilenetv2", "cifar100"),
    "mobilenetv2-imagefolder": partial(paper.on_folder, "mobilenetv2"),
    "deit-tiny-cifar10": partial(paper.on_cifar, "deit-tiny", "cifar10"),
    "deit-tiny-cifar100": partial(paper.on_cifar, "deit-tiny", "cifar100"),
    "deit-tiny-imagefolder": partial(paper.on_folder, "deit-tiny"),
}
"""Every workload by name. Times in their descriptions are for one thread of a 2020s server CPU."""


def load_workload(name: str) -> Workload:
    """Return the workload called `name`.

    Args:
        name: A key of `WORKLOADS`; one that ends in "-imagefolder", with a colon and a folder behind it; or
            "package.module:function", where the user's function takes nothing and returns a Workload.

    Raises:
        UsageError: No such workload.
    """
    known, _, rest = name.partition(":")
    if known not in WORKLOADS:
        return _own(name)
    workload = WORKLOADS[known]()
    if workload.source == "imagefolder":
        if not rest:
            raise UsageError(f"{name}: name the folder, as in {name}:/data/imagenet")
        workload = replace(workload, name=name, source=f"imagefolder:{rest}")
    elif rest:
        raise UsageError(f"{name}: {known} takes nothing behind a colon")
    return _documented(workload, WORKLOADS[known])


def own_code(name: str) -> str:
    """Return a fingerprint of the user's file with the workload `name`; empty for the toolkit's own workloads."""
    ours = name.partition(":")[0] in WORKLOADS
    return "" if ours else code_of(named("workload", name, WORKLOADS))


def _own(name: str) -> Workload:
    """A workload from a user's function."""
    function = named("workload", name, WORKLOADS)
    workload = function()
    if not isinstance(workload, Workload):
        raise UsageError(f"workload {name!r}: the function returns {workload!r}: return a collect.workloads.Workload")
    return _documented(workload, function)


def _documented(workload: Workload, function: Callable[[], Workload]) -> Workload:
    """The workload with the first line of its function's docstring as `doc`, if it has none."""
    if workload.doc:
        return workload
    return replace(workload, doc=(inspect.getdoc(function) or "").split("\n")[0])

"""The paper's networks, on small files of the formats that users have."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from collect.hooks.recorder import Recorder
from collect.training.loop import train
from collect.workloads import WORKLOADS, load_workload
from data.sources import load_source
from predictor.errors import UsageError
from predictor.model.sampling import SampleSpec
from tests.collect.tiny import order_of_use, tiny_source
from tests.collect.users_disk import write_cifar

NAMES = [name for name in WORKLOADS if name.rpartition("-")[2] in ("cifar10", "cifar100", "imagefolder")]
TRAINED = [
    "resnet56-cifar100",
    "resnet50-cifar10",
    "vgg11-cifar100",
    "mobilenetv2-cifar10",
    "deit-tiny-cifar100",
    "mobilenetv2-imagefolder",
    "deit-tiny-imagefolder",
]
"""The networks for CIFAR-10 and CIFAR-100 differ in the head alone; large ones for folders are torchvision's."""


@pytest.fixture
def users_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files of CIFAR's format, and a folder of images, where users keep theirs."""
    import torchvision

    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    for dataset in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        write_cifar(tmp_path, dataset, monkeypatch)
    for split in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(number).integers(0, 256, (50, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.png")
    return tmp_path


def test_the_papers_networks_on_its_kinds_of_data() -> None:
    families = Counter(load_workload(f"{name}:x" if "folder" in name else name).family for name in NAMES)
    assert families == {"resnet": 5, "vgg": 3, "mobilenet": 3, "vit": 5}


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_of_the_paper_takes_steps_and_is_recorded(name: str, users_disk: Path) -> None:
    if name.startswith("deit"):
        pytest.importorskip("timm", reason="an optional extra")
    workload = load_workload(f"{name}:{users_disk}/photos@64" if name.endswith("folder") else name)
    workload = workload.with_recipe(batch_size=2, accumulate=1, epochs=1, train_samples=4, warmup=0, momentum=0)
    source = load_source(workload.source, train_samples=4)
    recorder = Recorder(SampleSpec(weights=64, snapshots=2))
    training = train(workload, seed=0, hooks=[recorder], device="cpu", source=source)
    assert (training.status, training.step) == ("finished", 2)
    assert (
        len(training.layers)
        == {"resnet56": 57, "resnet50": 53, "vgg11": 8, "mobilenetv2": 52, "deit-tiny": 49}[name.rpartition("-")[0]]
    )
    weights_TLK = recorder.fields()["weights_TLK"]
    assert weights_TLK.shape == (3, len(training.layers), 64)
    assert (weights_TLK[0] != weights_TLK[2]).any(axis=1).all(), "a layer stood still"

    inputs = source.probe(2)
    names = [layer.name for layer in training.layers]
    assert order_of_use(training.model, inputs)[: len(names)] == names
    assert training.model(inputs).shape == (2, source.classes)


def test_small_images_keep_their_resolution() -> None:
    class Small:
        name, kind, classes, shape = "small", "image", 10, (3, 32, 32)

    sizes = {}
    for name in ("resnet50", "vgg11", "mobilenetv2"):
        with torch.device("meta"):
            model = load_workload(f"{name}-cifar10").model(Small())  # type: ignore[arg-type]
        seen: list[tuple[int, int]] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, i, output: seen.append(tuple(output.shape[2:])))  # noqa: B023
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
        sizes[name] = (seen[0], seen[-1])
    assert sizes == {"resnet50": ((32, 32), (4, 4)), "vgg11": ((32, 32), (2, 2)), "mobilenetv2": ((32, 32), (4, 4))}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="this workload's network comes from timm: pip install timm"):
        load_workload("deit-tiny-cifar10").model(tiny_source())

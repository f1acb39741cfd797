"""Networks that come pretrained: the weights are the real ones, the head is new; they train, freeze, are recorded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from collect.hooks.cka import ProbeSpec, Similarity
from collect.hooks.recorder import Recorder
from collect.training.loop import train
from collect.workloads import WORKLOADS, finetune_images, finetune_text, load_workload
from collect.workloads.finetune_images import AsPretrained
from collect.workloads.resnet import ResNet
from collect.workloads.transfer import load_body, weights_of
from data.locations import folder_of
from data.sources import load_source
from data.sources.base import Source, balanced
from data.sources.memory import Look
from evaluate.trials.flops import StepFlops
from predictor import layers_of
from predictor.errors import FileFault
from predictor.model.sampling import SampleSpec
from tests.collect.pretrained import needs_lite, needs_minilm
from tests.collect.tiny import order_of_use

KINDS = [
    pytest.param("lite0-fashion", marks=needs_lite),
    pytest.param("minilm-glosses", marks=needs_minilm),
    "resnet20-transfer",
]
HEADS = {
    "lite0-fashion": ("network.classifier", 1280, 10),
    "minilm-glosses": ("network.classifier", 384, 10),
    "resnet20-transfer": ("14", 64, 5),
}


def built(name: str, source: Source, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return load_workload(name).model(source)


def file_of(name: str) -> list[Tensor]:
    """The tensors of the file that the network's weights come from, in the order of the network's."""
    if name == "lite0-fashion":
        path = next(folder_of("efficientnet-lite0").glob("*.pth"))
        return list(torch.load(path, weights_only=True).values())
    if name == "resnet20-transfer":
        found = load_file(weights_of("resnet20"))
        return [found[key] for key in ResNet(load_source("fashion-first"), 3, 16).state_dict()]
    found = load_file(folder_of("minilm") / "model.safetensors")
    order = [key for key in built(name, load_source("glosses@minilm")).state_dict() if "classifier" not in key]
    return [found[key.removeprefix("network.bert.")] for key in order]


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_are_those_of_the_file_and_the_head_is_new(name: str, source_of: Callable[[str], Source]) -> None:
    model = built(name, source_of(name))
    head, width, classes = HEADS[name]
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}
    assert len(own) == len(model.state_dict()) - 2
    assert all(torch.equal(a, b) for a, b in zip(own.values(), file_of(name), strict=False))
    assert model.get_submodule(head).weight.shape == (classes, width)
    assert 0 < model.get_submodule(head).weight.std() < 0.2


@pytest.mark.parametrize("name", KINDS)
def test_the_seed_makes_the_head_and_nothing_else(name: str, source_of: Callable[[str], Source]) -> None:
    for module in (finetune_images, finetune_text):
        module._pretrained.cache_clear()
    first = built(name, source_of(name)).state_dict()  # reads the file
    again, other = (built(name, source_of(name), seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    differ = {key for key in first if not torch.equal(first[key], other[key])}
    assert f"{HEADS[name][0]}.weight" in differ
    assert all(key.startswith(HEADS[name][0]) for key in differ)


@pytest.mark.parametrize("name", KINDS)
def test_copies_share_no_memory(name: str, source_of: Callable[[str], Source]) -> None:
    one, other = built(name, source_of(name)), built(name, source_of(name))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(value.any() for key, value in other.named_parameters() if "weight" in key)


@needs_lite
def test_pretrained_features_tell_clothes_apart_better_than_random_ones() -> None:
    source = load_source("fashion", train_samples=120)
    _, x_BCHW, labels_B = next(source.batches("train", 120, shuffle=False))
    test_BCHW, wanted_B = source.probe(80), source.labels("test")[balanced(source.labels("test"), 80)]
    model = built("lite0-fashion", source).eval()

    def accuracy() -> float:
        with torch.no_grad():
            train_BF, test_BF = (
                model.network.forward_head(model.network.forward_features(model.input(x)), pre_logits=True)
                for x in (x_BCHW, test_BCHW)
            )
        probe = RidgeClassifier(alpha=100.0).fit(train_BF, labels_B)
        return float(probe.score(test_BF, wanted_B))

    pretrained = accuracy()
    assert pretrained > 0.65
    for value in model.network.state_dict().values():
        if value.dim() > 1:  # each tensor's weights in another order, so that only what they have learnt is gone
            value.copy_(value.flatten()[torch.randperm(value.numel())].view_as(value))
    assert accuracy() < pretrained - 0.1


@needs_minilm
def test_padding_says_nothing_to_minilm(source_of: Callable[[str], Source]) -> None:
    model = built("minilm-glosses", source_of("minilm-glosses")).eval()
    _, tokens_BT, _ = next(source_of("minilm-glosses").batches("train", 40, shuffle=False))
    lengths_B = (tokens_BT != 0).sum(dim=1)
    short = int(lengths_B.argmin())
    with torch.no_grad():
        logits_BC = model(tokens_BT)
        alone_BC = model(tokens_BT[short : short + 1, : lengths_B[short]])
    torch.testing.assert_close(logits_BC[short : short + 1], alone_BC, rtol=1e-4, atol=1e-5)


def test_a_sources_image_becomes_one_that_imagenet_knows() -> None:
    look = Look(mean=(50.0,), deviation=(20.0,))
    bytes_BCHW = torch.tensor([0.0, 255.0, 127.5]).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    found = AsPretrained(look)((bytes_BCHW - 50) / 20)
    assert found.shape == (3, 3, 64, 64)
    torch.testing.assert_close(found[:, :, 5, 5], torch.tensor([[-1.0], [1.0], [0.0]]).expand(3, 3))
    corners = torch.zeros(1, 3, 2, 2)
    corners[0, 1, 0, 0] = 255
    colours = AsPretrained(Look(mean=(0.0, 0.0, 0.0), deviation=(1.0, 1.0, 1.0)))(corners)
    assert (colours[0, 1, 0, 0], colours[0, 0].max(), colours[0, 1, 63, 63]) == (1, -1, -1)
    assert -1 < colours[0, 1, 32, 32] < 0  # bilinear


# Layers, training, freezing


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        pytest.param("lite0-fashion", 49, "network.conv_stem", "network.conv_head", marks=needs_lite),
        pytest.param(
            "minilm-glosses",
            40,  # three embeddings, six blocks of six, the pooler
            "network.bert.embeddings.word_embeddings",
            "network.bert.pooler.dense",
            marks=needs_minilm,
        ),
        ("resnet20-transfer", 21, "0", "11.conv2"),
    ],
)
def test_layers(name: str, count: int, first: str, last: str, source_of: Callable[[str], Source]) -> None:
    model, source = built(name, source_of(name)), source_of(name)
    layers = layers_of(model, source.probe(2))
    assert (len(layers), layers[0].name, layers[-1].name) == (count, first, last)
    head = {id(parameter) for parameter in model.get_submodule(HEADS[name][0]).parameters()}
    frozen = [id(parameter) for layer in layers for parameter in layer.parameters()]
    assert not head & set(frozen)
    assert len(frozen) + len(head) == len(list(model.parameters()))
    used = [part for part in order_of_use(model, source.probe(2)) if part in {layer.name for layer in layers}]
    assert used == [layer.name for layer in layers]


@pytest.mark.parametrize("name", KINDS)
def test_a_few_steps_are_taken_and_recorded(name: str, source_of: Callable[[str], Source]) -> None:
    workload = load_workload(name).with_recipe(epochs=2, batch_size=8, train_samples=None)
    recorder = Recorder(SampleSpec(weights=32, snapshots=3))
    similarity = Similarity(SampleSpec(weights=32, snapshots=3), ProbeSpec(samples=8, features=16))
    training = train(workload, seed=0, hooks=(recorder, similarity), device="cpu", budget=0.3, source=source_of(name))
    assert training.status == "finished"
    assert training.total_steps == 3
    weights_TLK = recorder.fields()["weights_TLK"]
    assert len(training.layers) == weights_TLK.shape[1]
    assert ((weights_TLK[0] != weights_TLK[-1]).any(axis=-1)).all()  # every layer moves
    unknown = {layer.name for layer, c in zip(training.layers, similarity.similarity_TL[-1], strict=True) if c != c}
    assert unknown <= {"network.bert.embeddings.token_type_embeddings"}  # the same for all inputs
    assert np.nanmax(similarity.similarity_TL) < 1.0001
    assert np.nanmin(similarity.similarity_TL[-1]) > 0.9999


@pytest.mark.parametrize("name", KINDS)
def test_frozen_layers_are_counted_out(name: str, source_of: Callable[[str], Source]) -> None:
    flops, source = StepFlops(load_workload(name), source_of(name)), source_of(name)
    count = len(layers_of(built(name, source), source.probe(2)))
    whole, none = flops(frozenset()), flops(frozenset(range(count)))
    assert none / whole == pytest.approx(1 / 3, abs=0.01)  # the forward pass alone, and the head


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith(("lite", "minilm", "resnet20-"))])
def test_what_a_list_of_workloads_says(name: str) -> None:
    workload = load_workload(name)
    assert workload.name == name
    assert workload.doc.endswith(("minutes.", "minute."))
    assert workload.family in ("efficientnet-lite", "bert", "resnet")
    if name not in ("resnet20-first", "resnet20-fashion"):
        assert workload.recipe.train_samples == 2000
        assert not workload.recipe.augment


# What is missing or broken


def test_weights_of_another_network_are_refused(tmp_path: Path, source_of: Callable[[str], Source]) -> None:
    source, path = source_of("resnet20-transfer"), tmp_path / "weights.safetensors"
    model = ResNet(source, 1, 4)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for found, odd in {
        "less": {name: value for name, value in own.items() if name != "1.bias"},
        "more": {**own, "1.bias.more": torch.zeros(1)},
        "wider": {**own, "1.bias": torch.zeros(5)},
    }.items():
        save_file(odd, path)
        with pytest.raises(FileFault, match=r"weights.safetensors: not the weights of .* differ in 1\.bias"):
            load_body(model, path)
        assert found
    save_file({**own, "8.weight": torch.zeros(3, 16), "8.bias": torch.zeros(3)}, path)
    load_body(model, path)  # a head for other classes is none of its business
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FileFault, match=r"no weights that can be read .* make it with `python -m collect pretrain`"):
        load_body(model, path)
    with pytest.raises(FileFault, match="nowhere: no weights that can be read"):
        load_body(model, tmp_path / "nowhere")

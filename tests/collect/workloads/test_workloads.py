import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from collect.training.loop import train
from collect.workloads import WORKLOADS, Recipe, Workload, load_workload
from collect.workloads.textcnn import TextCnn
from collect.workloads.texttransformer import TextTransformer
from data.sources import load_source
from data.sources.base import Source
from predictor import layers_of
from predictor.errors import UsageError
from tests.collect.tiny import order_of_use

PRETRAINED = ("lite", "minilm")  # in test_finetune.py
SMALL = [
    name
    for name in WORKLOADS
    if name.rpartition("-")[2] in ("fashion", "glosses", "digits") and not name.startswith(PRETRAINED)
]
FAMILIES = {
    "mlp", "vgg", "resnet", "mobilenet", "densenet", "mixer", "convnext", "vit", "textcnn", "texttransformer",
}  # fmt: skip


@pytest.fixture(scope="module")
def source_of() -> Callable[[str], Source]:
    sources: dict[str, Source] = {}

    def load(name: str) -> Source:
        return sources.setdefault(name, load_source(name))

    return load


def test_at_least_nine_families_in_minutes_and_some_in_seconds() -> None:
    families = {load_workload(name).family for name in SMALL if not name.endswith("-digits")}
    assert families == FAMILIES
    assert len([name for name in SMALL if name.endswith("-digits")]) >= 5


@pytest.mark.parametrize("name", SMALL)
def test_a_small_workload(name: str, source_of: Callable[[str], Source]) -> None:
    workload = load_workload(name)
    assert workload.name == name
    assert workload.source == name.rpartition("-")[2]
    assert workload.family in FAMILIES
    assert workload.doc.endswith(".")
    source = source_of(workload.source)
    model = workload.model(source)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000

    batch = next(source.batches("train", 8, shuffle=True))
    logits_BC = model(batch[1])
    assert logits_BC.shape == (8, source.classes)
    nn.functional.cross_entropy(logits_BC, batch[2]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    layers = layers_of(model)
    assert len(layers) >= 4
    assert order_of_use(model, batch[1])[: len(layers)] == [layer.name for layer in layers]


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith("-digits")])
def test_a_network_learns(name: str) -> None:
    source = load_source("digits", train_samples=100)
    workload = load_workload(name).with_recipe(epochs=8, batch_size=10, train_samples=100)
    losses = [row["train_loss"] for row in train(workload, seed=0, device="cpu", source=source).curve]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("network", [lambda s: TextCnn(s, 8, 8, 2, 0.0), lambda s: TextTransformer(s, 8, 1, 2, 0.0)])
def test_padding_says_nothing(network: Callable[[Source], nn.Module], source_of: Callable[[str], Source]) -> None:
    torch.manual_seed(0)
    model = network(source_of("glosses")).eval()
    tokens_BT = torch.zeros(2, 32, dtype=torch.int64)
    tokens_BT[0, :5] = torch.arange(2, 7)
    with torch.no_grad():
        short, full = model(tokens_BT[:1, :8] if isinstance(model, TextCnn) else tokens_BT[:1]), model(tokens_BT)
    assert torch.isfinite(full).all()  # a text without words, too
    torch.testing.assert_close(short[0], full[0])
    tokens_BT[0, 4] = 9
    assert not torch.allclose(model(tokens_BT)[0], full[0])


@pytest.mark.parametrize(("name", "kind"), [("textcnn-glosses", "image"), ("resnet8-fashion", "text")])
def test_a_network_refuses_what_it_cannot_read(name: str, kind: str, source_of: Callable[[str], Source]) -> None:
    source = source_of("digits" if kind == "image" else "glosses")
    with pytest.raises(UsageError, match=f"source '{source.name}' holds {kind}, and this model takes"):
        load_workload(name).model(source)


# Names


def test_an_unknown_name_is_told_of_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no workload 'resnet8-fashon': did you mean 'resnet8-fashion'\? there are"):
        load_workload("resnet8-fashon")


OWN = '''
from collect.workloads import Recipe, Workload
from collect.workloads.mlp import Mlp


def small() -> Workload:
    """A network of my own.

    With more to say.
    """
    return Workload("mine", "mlp", lambda source: Mlp(source, (8,)), "digits", Recipe(epochs=1))


def wrong():
    return 3
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "nets.py").write_text(OWN)
    (tmp_path / "own" / "broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "own.nets"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[name]


def test_a_workload_of_the_users_own(own_module: str, source_of: Callable[[str], Source]) -> None:
    workload = load_workload(f"{own_module}:small")
    assert (workload.name, workload.doc) == ("mine", "A network of my own.")
    assert train(workload, seed=0, device="cpu", source=source_of("digits")).status == "finished"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.nets:smal", r"own\.nets has no function or class smal"),
        ("own.nets:__doc__", r"own\.nets has no function or class __doc__"),
        ("own.nets:wrong", "the function returns 3: return a collect.workloads.Workload"),
        ("own.nothing:small", r"importing own\.nothing fails .*: run from the folder that holds it"),
        ("own.broken:small", r"importing own\.broken fails \(No module named 'no_such_package_at_all'\)"),
        ("own.nets", "there is no workload 'own.nets'"),
        (":small", "there is no workload ':small'"),
        ("..own:small", r"there is no workload '\.\.own:small'"),
        ("", "there is no workload ''"),
    ],
)
def test_a_workload_of_the_users_own_that_is_not_there(own_module: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_workload(name)


def test_a_folder_is_named_after_a_colon() -> None:
    workload = load_workload("resnet50-imagefolder:/data/my:images@128")
    assert workload.source == "imagefolder:/data/my:images@128"
    assert workload.name == "resnet50-imagefolder:/data/my:images@128"
    with pytest.raises(UsageError, match=r"resnet50-imagefolder: .* resnet50-imagefolder:/"):
        load_workload("resnet50-imagefolder")
    with pytest.raises(UsageError, match="mlp-digits takes nothing behind a colon"):
        load_workload("mlp-digits:3")


# Recipes


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("epochs", 0, "greater than 0"),
        ("epochs", math.nan, "finite number"),
        ("epochs", math.inf, "finite number"),
        ("epochs", "10", "number"),
        ("batch_size", 0, "greater than 0"),
        ("batch_size", 2.5, "integer"),
        ("batch_size", True, "integer"),
        ("batch_size", None, "integer"),
        ("accumulate", 0, "greater than 0"),
        ("lr", -0.1, "greater than 0"),
        ("clip_norm", 0, "greater than 0"),
        ("train_samples", 0, "greater than 0"),
        ("momentum", 1.0, "less than 1"),
        ("warmup", 1.0, "less than 1"),
        ("warmup", -0.1, "greater than or equal to 0"),
        ("label_smoothing", 1.5, "less than 1"),
        ("weight_decay", -1, "greater than or equal to 0"),
        ("augment", "yes", "boolean"),
        ("optimizer", "adam", "did you mean 'adamw'"),
        ("schedule", "step", "did you mean 'steps'"),
    ],
)
def test_a_recipe_that_cannot_work(field: str, value: Any, cure: str) -> None:
    with pytest.raises(UsageError, match=f"{field}: {value!r}: .*{cure}"):
        Recipe(**{field: value})


def test_whole_numbers_and_others_make_the_same_recipe() -> None:
    assert json.dumps(asdict(Recipe(epochs=3, lr=1, clip_norm=2, momentum=0))) == json.dumps(
        asdict(Recipe(epochs=3.0, lr=1.0, clip_norm=2.0, momentum=0.0))
    )


def test_changing_a_recipe() -> None:
    workload = load_workload("mlp-digits")
    changed = workload.with_recipe(epochs=2, lr=0.3)
    assert (changed.recipe.epochs, changed.recipe.lr) == (2, 0.3)
    assert changed.recipe.batch_size == workload.recipe.batch_size
    assert changed.name == workload.name
    with pytest.raises(UsageError, match=r"there is no recipe field 'epoch': did you mean 'epochs'\?"):
        workload.with_recipe(epoch=2)


def test_a_workload_needs_no_more_than_its_first_four_fields() -> None:
    assert Workload("mine", "mlp", lambda source: nn.Linear(1, 1), "digits").recipe == Recipe()

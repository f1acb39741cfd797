"""The pretraining command on a few steps, and the weights that ship against what their card says."""

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
from collect.workloads.transfer import WEIGHTS, load_body
from data.sources import load_source


def card_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["smartfrz"])
    return card


def test_what_is_written_is_what_was_trained_and_the_other_workload_can_start_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.safetensors"
    training = pretrain(path, device="cpu", budget=0.005)
    found, own = load_file(path), training.model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    card, accuracy = card_of(path), training.curve[-1]["test_accuracy"]
    assert (card["workload"], card["source"], card["steps"]) == ("resnet20-first", "fashion-first", 4)
    assert card["test_accuracy"] == accuracy
    out = capsys.readouterr().out
    assert f"step 4 of 4: {accuracy:.1%} of the test images right" in out
    assert f"{path}: {accuracy:.1%} of the test images of its own classes" in out
    model = load_workload("resnet20-transfer").model(load_source("fashion-last"))
    head = model[-1].weight.clone()
    load_body(model, path)
    assert torch.equal(model[0].weight, found["0.weight"])
    assert torch.equal(model[-1].weight, head)


def test_the_shipped_weights_are_as_good_as_their_card_says() -> None:
    source, card = load_source("fashion-first"), card_of(WEIGHTS)
    model = load_workload("resnet20-first").model(source)
    model.load_state_dict(load_file(WEIGHTS))
    model.eval()
    with torch.no_grad():
        _, x_BCHW, labels_B = next(source.batches("test", 1000, shuffle=False))
        accuracy = (model(x_BCHW).argmax(dim=1) == labels_B).double().mean().item()
    assert accuracy == pytest.approx(card["test_accuracy"], abs=0.002)  # other processors round otherwise
    assert accuracy > 0.9
    assert f"{card['test_accuracy']:.1%}".replace("%", " %") in (WEIGHTS.parent / "README.md").read_text()
    assert card["steps"] == 780
    assert WEIGHTS.stat().st_size < 1.2e6


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[Path, str]] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda path, device: called.append((path, device)))
    assert program.main(["pretrain"]) is None
    assert program.main(["pretrain", "--out", str(tmp_path / "mine"), "--device", "cpu"]) is None
    assert called == [(WEIGHTS, "auto"), (tmp_path / "mine", "cpu")]

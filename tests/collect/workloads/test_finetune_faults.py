"""Pretrained networks where something is missing, broken or of another kind: the error names it and the cure."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from collect.workloads import finetune_images, finetune_text, load_workload
from data.locations import PLACES, folder_of
from data.sources import load_source
from data.sources.base import Source
from predictor.errors import FileFault, UsageError
from tests.collect.pretrained import needs_lite, needs_minilm


@needs_minilm
def test_minilm_takes_no_others_tokens() -> None:
    with pytest.raises(UsageError, match=r"source 'glosses' has .* tokens, and minilm .* whose name ends in @minilm"):
        load_workload("minilm-glosses").model(load_source("glosses"))


@needs_lite
def test_lite_takes_no_text() -> None:
    with pytest.raises(UsageError, match="source 'glosses' holds text, and this model takes images"):
        load_workload("lite0-fashion").model(load_source("glosses"))


@pytest.mark.parametrize(("name", "package"), [("lite0-fashion", "timm"), ("minilm-glosses", "transformers")])
def test_a_missing_package_is_named(
    name: str, package: str, tmp_path: Path, source_of: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("resnet20-transfer") if package == "timm" else load_source("glosses")
    put_files(monkeypatch, tmp_path, b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"this workload's network comes from {package}: pip install {package}"):
        load_workload(name).model(source)


def put_files(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes) -> None:
    """Put files of this content where the packages' files are looked for."""
    for module in (finetune_images, finetune_text):
        monkeypatch.setattr(module, "_pretrained", module._pretrained.__wrapped__)
    for name in ("efficientnet-lite0", "minilm"):
        for pattern in PLACES[name].files:
            (folder / pattern.replace("*", "0")).write_bytes(content)
        monkeypatch.setitem(PLACES, name, replace(PLACES[name], folders=(str(folder),)))


@needs_lite
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other"])
def test_a_broken_file_of_lite_is_named(
    damage: str, tmp_path: Path, source_of: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(folder_of("efficientnet-lite0").glob("*.pth"))
    contents = {"empty": lambda: b"", "cut": lambda: path.read_bytes()[:9000], "text": lambda: b"no weights at all"}
    if damage == "other":
        torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
        contents["other"] = (tmp_path / "other.pth").read_bytes
    put_files(monkeypatch, tmp_path, contents[damage]())
    with pytest.raises(FileFault, match=r"efficientnet-lite0-0\.pth: no(t the weights| weights that can be read)"):
        load_workload("lite0-fashion").model(source_of("resnet20-transfer"))


@needs_minilm
def test_a_broken_file_of_minilm_is_named(
    tmp_path: Path, source_of: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = source_of("minilm-glosses"), (folder_of("minilm") / "config.json").read_bytes()
    put_files(monkeypatch, tmp_path, config)
    with pytest.raises(FileFault, match=f"{tmp_path}: no weights that can be read"):
        load_workload("minilm-glosses").model(source)
    save_file({"embeddings.word_embeddings.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(FileFault, match=rf"{tmp_path}: not the weights of its config\.json"):
        load_workload("minilm-glosses").model(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileFault, match=f"{tmp_path}: no weights that can be read"):
        load_workload("minilm-glosses").model(source)

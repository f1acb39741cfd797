"""BERT-base on GLUE and DeiT-S on CIFAR-100, as small networks and files in the formats that users have."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from collect.hooks.recorder import Recorder
from collect.training.loop import train
from collect.workloads import WORKLOADS, finetune_images, finetune_text, load_workload
from data.locations import LOCATIONS
from data.sources import load_source
from predictor.errors import FileFault
from predictor.model.sampling import SampleSpec
from tests.collect.users_disk import WORDS, write_bert, write_cifar, write_glue

TASKS = ("mrpc", "cola", "sst2")
SEPARATOR = WORDS.index("[SEP]")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_deit(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """What timm makes in place of DeiT-S."""
    timm = pytest.importorskip("timm", reason="an optional extra")
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2, embed_dim=24, num_heads=2))
    torch.manual_seed(0)
    network: torch.nn.Module = timm.create_model("deit_small_patch16_224")
    return network


@pytest.mark.parametrize("task", TASKS)
def test_bert_starts_from_the_file_and_every_layer_moves(task: str, disk: Path) -> None:
    pytest.importorskip("transformers", reason="an optional extra")
    write_glue(disk)
    found = write_bert(disk)
    workload = load_workload(f"bert-base-{task}").with_recipe(batch_size=4, epochs=2, warmup=0)
    source = load_source(workload.source)
    own = workload.model(source).state_dict()
    for name, tensor in own.items():
        if "classifier" not in name:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            assert torch.equal(tensor, found[old.removeprefix("network.")])
    recorder = Recorder(SampleSpec(weights=16, snapshots=2))
    training = train(workload, seed=0, hooks=[recorder], device="cpu", source=source)
    assert (training.status, training.step) == ("finished", 4)
    weights_TLK = recorder.fields()["weights_TLK"]
    assert len(training.layers) == 3 + 2 * 6 + 1
    assert ((weights_TLK[0] != weights_TLK[-1]).any(axis=-1)).all()


def test_the_second_text_of_a_pair_is_another_segment(disk: Path) -> None:
    pytest.importorskip("transformers", reason="an optional extra")
    write_glue(disk)
    write_bert(disk)
    seen = {}
    for task in TASKS:
        source = load_source(f"{task}@bert-base")
        model = load_workload(f"bert-base-{task}").model(source)
        assert isinstance(model, finetune_text.Bert)
        embeddings = model.network.base_model.embeddings.token_type_embeddings
        embeddings.register_forward_hook(lambda module, inputs, output, task=task: seen.update({task: inputs[0]}))
        _, tokens_BT, _ = next(source.batches("train", 2, shuffle=False))
        model(tokens_BT)
        if task == "mrpc":
            assert seen[task][1].tolist()[:17] == [0] * 7 + [1] * 8 + [0] * 2
            assert tokens_BT[1, [6, 14]].tolist() == [SEPARATOR] * 2
            assert not tokens_BT[1, 15:].any()
        else:
            assert not seen[task].any()


@pytest.mark.parametrize("form", ["author's .pth", "timm's .safetensors"])
def test_deit_starts_from_the_file_and_every_layer_moves(
    form: str, disk: Path, small_deit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    write_cifar(disk, torchvision.datasets.CIFAR100, monkeypatch)
    found = small_deit.state_dict()
    (disk / "deit-small").mkdir()
    if form == "author's .pth":
        torch.save({"model": found}, disk / "deit-small" / "deit_small_patch16_224-cd65a155.pth")
    else:
        save_file(found, disk / "deit-small" / "model.safetensors")
    workload = load_workload("deit-small-cifar100").with_recipe(batch_size=2, epochs=1, warmup=0, train_samples=4)
    workload.check_files()
    source = load_source(workload.source)
    model = workload.model(source)
    assert isinstance(model, finetune_images.FineTuned)
    own = model.network.state_dict()
    assert {
        name for name in own if own[name].shape != found[name].shape or not torch.equal(own[name], found[name])
    } == {
        "head.weight",
        "head.bias",
    }
    images = model.input(source.probe(1))
    assert images.shape == (1, 3, 224, 224)
    recorder = Recorder(SampleSpec(weights=16, snapshots=2))
    training = train(workload, seed=0, hooks=[recorder], device="cpu", source=source)
    assert (training.status, training.step) == ("finished", 2)
    weights_TLK = recorder.fields()["weights_TLK"]
    assert ((weights_TLK[0] != weights_TLK[-1]).any(axis=-1)).all()


def test_weights_of_another_network_are_refused(disk: Path, small_deit: torch.nn.Module) -> None:
    (disk / "deit-small").mkdir()
    path = disk / "deit-small" / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FileFault, match=r"model\.safetensors: not the weights of timm's deit_small_patch16_224"):
        finetune_images._pretrained("deit_small_patch16_224", disk / "deit-small")
    path.write_bytes(b"{")
    with pytest.raises(FileFault, match=r"model\.safetensors: no weights that can be read"):
        finetune_images._pretrained("deit_small_patch16_224", disk / "deit-small")


@pytest.mark.parametrize(("name", "needs"), [("bert-base-cola", "bert-base"), ("deit-small-cifar100", "deit-small")])
def test_missing_weights_are_named_with_their_cure(name: str, needs: str, disk: Path) -> None:
    with pytest.raises(FileFault, match=rf"{needs} .* is not on this machine; to get it: .*{disk}/{needs}"):
        load_workload(name).check_files()


def test_every_file_that_a_workload_needs_has_a_location() -> None:
    needed = {load_workload(name).needs for name in WORKLOADS if not name.endswith("imagefolder")}
    assert needed - {""} == {"minilm", "bert-base", "deit-small", *(f"efficientnet-lite{n}" for n in range(3))}
    assert needed - {""} <= LOCATIONS.keys()

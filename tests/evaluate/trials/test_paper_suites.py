"""The suites of the papers' own comparisons plan on small files of the users' formats, or say what is missing."""

from pathlib import Path
from typing import Any

import pytest

from collect.training.loop import train
from collect.workloads import load_workload
from data.locations import LOCATIONS
from evaluate.__main__ import main
from evaluate.trials.freezing import CacheHook, FreezeHook
from evaluate.trials.suite import read_suite
from predictor.errors import FileFault
from predictor.policies import make_policy
from tests.collect.users_disk import write_bert, write_cifar, write_glue

SUITES = ("paper-resnet56", "paper-bert", "paper-deit")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def dry_run(name: str, tmp_path: Path) -> Any:
    return main(["run-suite", "--suite", name, "--dry-run", "--device", "cpu", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name", SUITES)
def test_it_plans_where_the_files_are(
    name: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torchvision

    write_cifar(disk, torchvision.datasets.CIFAR100, monkeypatch, images=128)
    (disk / "deit-small").mkdir()
    (disk / "deit-small" / "model.safetensors").touch()
    if name == "paper-bert":
        pytest.importorskip("transformers", reason="an optional extra")
        write_bert(disk)
        write_glue(disk, times=4)
    assert dry_run(name, tmp_path) == 0
    suite = read_suite(name)
    trials = len(suite.workloads) * len(suite.policies) * len(suite.seeds)
    assert f"{trials} trials" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SUITES)
def test_what_is_missing_is_one_line_with_its_cure(name: str, disk: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFault, match=r"is not on this machine; to get it: .+") as caught:
        dry_run(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(disk) in str(caught.value)
    assert str(caught.value).split(" ")[0] in LOCATIONS


@pytest.mark.parametrize("name", SUITES)
def test_all_that_a_reviewer_asks_for_is_in_it(name: str) -> None:
    suite = read_suite(name)
    entries = {(entry.name, bool(entry.cache)) for entry in suite.policies}
    assert {("smartfrz", False), ("smartfrz", True), ("static", True), ("linear", True)} < entries
    assert {"egeria", "autofreeze", "stopped"} < {entry.name for entry in suite.policies}
    lengths = [entry.options["budget"] for entry in suite.policies if entry.name == "shorter"]
    assert lengths == [0.85, 0.7, 0.5, 0.35]
    assert all(not entry.options for entry in suite.policies if entry.name == "smartfrz"), "a setting by hand"
    assert len(suite.seeds) == 5


def test_the_features_of_pairs_of_texts_are_kept_as_they_were(disk: Path) -> None:
    pytest.importorskip("transformers", reason="an optional extra")
    write_bert(disk)
    write_glue(disk)
    workload = load_workload("bert-base-mrpc").with_recipe(batch_size=4, epochs=4, lr=1e-3)
    losses = []
    for cached in (False, True):
        freezing = FreezeHook(make_policy("static", share=0.6))
        hooks = [freezing, CacheHook(freezing)] if cached else [freezing]
        training = train(workload, seed=0, hooks=hooks, device="cpu")
        losses.append([row["test_loss"] for row in training.curve])
    assert sum(hooks[1].hits.values()) == 24  # all but the first pass over eight pairs
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]  # the head trains; under a rate that ends at zero the last epochs may be alike

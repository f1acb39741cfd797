import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collect.gather.plan import RunConfig, Suite, combinations, read_suite
from collect.hooks.cka import ProbeSpec
from collect.workloads import WORKLOADS, Recipe, Workload, load_workload
from predictor.errors import FileFault, UsageError
from predictor.model.sampling import SampleSpec
from tests.collect.tiny import PlainNet

MLP = '[[runs]]\nworkload = "mlp-digits"\n'


def suite_of(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return read_suite(str(path))


def config(**changes: Any) -> RunConfig:
    settings = {"seed": 0, "sampling": SampleSpec(), "probe": ProbeSpec(), **changes}
    return RunConfig("mlp-digits", settings.pop("workload", load_workload("mlp-digits")), **settings)


def test_combinations_change_the_last_key_first() -> None:
    table = {"a": [1, 2], "b": "x", "c": [True, False]}
    assert list(combinations(table)) == [
        {"a": 1, "b": "x", "c": True},
        {"a": 1, "b": "x", "c": False},
        {"a": 2, "b": "x", "c": True},
        {"a": 2, "b": "x", "c": False},
    ]
    assert list(combinations({"a": []})) == []
    assert list(combinations({})) == [{}]


def test_a_suite_is_every_combination_of_every_block(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path,
        """
        name = "mine"
        checkpoint_seconds = 5
        [sampling]
        weights = 16
        [probe]
        samples = 32
        [[runs]]
        workload = ["mlp-digits", "vgg-digits"]
        seed = [3, 4]
        lr = [0.1, 1]
        [[runs]]
        workload = "textcnn-glosses"
        train_samples = 500
        """,
    )
    assert suite.name == "mine"
    assert suite.checkpoint_seconds == 5.0
    assert len(suite.runs) == 9
    first = suite.runs[0]
    assert (first.reference, first.seed, first.workload.recipe.lr) == ("mlp-digits", 3, 0.1)
    assert first.workload.recipe == replace(load_workload("mlp-digits").recipe, lr=0.1)
    assert first.sampling == SampleSpec(weights=16)
    assert first.probe == ProbeSpec(samples=32)
    last = suite.runs[-1]
    assert (last.workload.source, last.seed, last.workload.recipe.train_samples) == ("glosses", 0, 500)


def test_another_source(tmp_path: Path) -> None:
    (run,) = suite_of(tmp_path, MLP + 'source = "fashion"\n').runs
    assert run.workload.source == "fashion"
    assert run.as_dict()["source"] == "fashion"
    assert run.title == "mlp-digits source=fashion seed=0"


def test_the_id_is_of_the_configuration_alone(tmp_path: Path) -> None:
    """Not of the order of settings, the spelling of numbers, the suite's name, or what the workload says anyway."""
    usual = load_workload("mlp-digits").recipe.lr
    one = suite_of(tmp_path, 'name = "a"\n' + MLP + f"lr = {usual}\nepochs = 3\nweight_decay = 1\nseed = 1")
    two = suite_of(
        tmp_path, 'name = "b"\ncheckpoint_seconds = 1\n' + MLP + "seed = 1\nweight_decay = 1.0\nepochs = 3.0"
    )
    assert one.runs[0].id == two.runs[0].id
    assert len(one.runs[0].id) == 12
    assert set(one.runs[0].id) <= set("0123456789abcdef")


def test_everything_in_the_configuration_changes_the_id() -> None:
    workload = load_workload("mlp-digits")
    variants = [
        config(),
        config(seed=1),
        config(sampling=SampleSpec(seed=1)),
        config(sampling=SampleSpec(weights=255)),
        config(probe=ProbeSpec(samples=127)),
        config(workload=replace(workload, source="fashion")),
        config(workload=workload.with_recipe(lr=0.123)),
        config(workload=workload.with_recipe(train_samples=100)),
        replace(config(), reference="other"),
    ]
    assert len({run.id for run in variants}) == len(variants)


def test_a_configuration_survives_json() -> None:
    run = config(workload=load_workload("mlp-digits").with_recipe(lr=0.3, clip_norm=1.0), seed=4)
    again = RunConfig.from_dict(json.loads(json.dumps(run.as_dict())))
    assert again.as_dict() == run.as_dict()
    assert again.id == run.id
    assert again.workload.recipe == run.workload.recipe
    assert again.title == "mlp-digits seed=4 lr=0.3 clip_norm=1.0"


def test_the_same_run_twice_is_one(tmp_path: Path) -> None:
    assert [run.seed for run in suite_of(tmp_path, MLP + "seed = [0, 1]\n" + MLP + "seed = [1, 2]").runs] == [0, 1, 2]


def my_workload() -> Workload:
    """Mine."""
    return Workload("my-net", "mine", lambda source: PlainNet(source.classes), "digits", Recipe(epochs=1))


def test_a_workload_of_the_users_own(tmp_path: Path) -> None:
    (run,) = suite_of(tmp_path, f'[[runs]]\nworkload = "{__name__}:my_workload"\n').runs
    assert run.workload.name == "my-net"
    assert RunConfig.from_dict(run.as_dict()).workload.family == "mine"


def test_ids_of_the_toolkits_own_runs_are_what_they_were() -> None:
    """Trajectories and outcomes that were gathered and published are found by them."""
    known = {"trajectories": "61d94acdc6b7", "outcomes": "1048099603b2", "paper": "317d8368cac5"}
    assert {name: read_suite(name).runs[0].id for name in known} == known
    assert all("code" not in run.as_dict() for name in known for run in read_suite(name).runs)


def test_changed_code_of_ones_own_makes_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mine = tmp_path / "mine_in_grid.py"
    text = '[[runs]]\nworkload = "mine_in_grid:tiny"\n'
    mine.write_text(f"from {__name__} import my_workload\ndef tiny(): return my_workload()\n")
    (before,) = suite_of(tmp_path, text).runs
    assert [run.id for run in suite_of(tmp_path, text).runs] == [before.id]
    again = RunConfig.from_dict(json.loads(json.dumps(before.as_dict())))
    with mine.open("a") as file:
        file.write("# changed\n")
    (after,) = suite_of(tmp_path, text).runs
    assert before.id != after.id
    assert again.id == before.id  # what is under way keeps its name
    older = {key: value for key, value in before.as_dict().items() if key != "code"}
    assert RunConfig.from_dict(older).as_dict() == older


def test_shards_are_all_runs_and_each_once(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, MLP + f"seed = {list(range(7))}")
    shards = [suite.shard(number, 3) for number in (1, 2, 3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert {run.id for shard in shards for run in shard} == {run.id for run in suite.runs}
    with pytest.raises(UsageError, match="shard 4/3"):
        suite.shard(4, 3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MLP + "lrr = 1", ("runs[0]", "lrr", "did you mean 'lr'?", "workload, seed, source")),
        (MLP + MLP + "lr = 0", ("runs[1]: lr: ", "0", "greater than 0")),
        ('[[runs]]\nworkload = "mlp-digit"', ("runs[0]", "'mlp-digit'", "did you mean 'mlp-digits'?")),
        ("[[runs]]\nlr = 1", ("runs[0]", "workload", "name a workload")),
        (MLP + 'lr = "fast"', ("lr: 'fast'", "number")),
        (MLP + "augment = 1", ("augment: 1", "boolean")),
        (MLP + 'optimizer = "adam"', ("optimizer: 'adam'", "did you mean 'adamw'?", "'sgd'")),
        (MLP + "train_samples = 1.5", ("train_samples: 1.5", "integer")),
        (MLP + "seed = -1", ("seed: -1", "greater than or equal to 0")),
        (MLP + f"seed = {2**64}", (f"seed: {2**64}", "less than")),
        ("checkpoint_seconds = nan\n" + MLP, ("checkpoint_seconds: nan", "finite")),
        ("checkpoint_seconds = -1\n" + MLP, ("checkpoint_seconds: -1", "greater than or equal to 0")),
        (MLP + "seed = true", ("seed: True", "integer")),
        (MLP + "seed = []", ("no runs", "empty")),
        ("", ("runs: missing",)),
        ("runs = 3", ("runs: 3",)),
        (MLP + "[samplings]\nweights = 1", ("samplings", "did you mean 'sampling'?")),
        (MLP + "[sampling]\nweight = 1", ("sampling.weight", "did you mean 'weights'?")),
        (MLP + "[sampling]\nweights = 0", ("sampling", "count from 1")),
        ("sampling = 3\n" + MLP, ("sampling: 3",)),
        (MLP + "[probe]\nsamples = 2", ("probe", "at least 4 samples")),
        (MLP + "lr = ", ("Invalid value",)),
        (MLP + f"lr = {'[' * 3000}", ()),
    ],
)
def test_what_is_wrong_with_a_suite_file(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(FileFault) as caught:
        suite_of(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: ")
    assert [part for part in parts if part not in str(caught.value)] == []


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no suite 'trajectory': did you mean 'trajectories'\? there are full, "):
        read_suite("trajectory")
    with pytest.raises(FileFault, match=r"nowhere/mine.toml: cannot be read \(No such file"):
        read_suite("nowhere/mine.toml")


def test_the_default_suite_never_sees_what_is_evaluated() -> None:
    runs = read_suite("trajectories").runs
    assert 20 <= len(runs) <= 40
    assert {run.workload.source for run in runs} == {"digits", "digits-last", "glosses"}
    families = {run.workload.family for run in runs}
    assert families == {"mlp", "vgg", "densenet", "mixer", "convnext", "vit", "textcnn"}
    for variety in ("lr", "optimizer", "weight_decay", "epochs", "batch_size"):
        assert len({getattr(run.workload.recipe, variety) for run in runs}) > 1
    assert {(run.sampling, run.probe) for run in runs} == {(SampleSpec(), ProbeSpec())}


def test_the_full_suite_has_every_small_workload_and_the_paper_suite_the_papers() -> None:
    small = {name for name in WORKLOADS if name.split("-")[-1] in ("digits", "fashion", "glosses")}
    small -= {name for name in small if name.startswith(("lite", "minilm"))}  # pretrained
    assert {run.reference for run in read_suite("full").runs} == small
    families = {run.workload.family for run in read_suite("paper").runs}
    assert len(read_suite("paper").runs) == 24
    assert len(families) == 4

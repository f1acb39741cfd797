"""The large suite: its number of runs, their variety, and the split into training and evaluation runs."""

import math
from pathlib import Path

from collect.gather.plan import RunConfig, read_suite, suite_path, tomllib
from collect.workloads.transfer import TRANSFERS
from data.sources import SOURCES
from predictor.training.splits import read_held_out

RUNS = read_suite("gathered").runs
HELD_OUT = read_held_out(Path(__file__).parents[3] / "data" / "dataset" / "held_out.toml")
EVALUATION = [run for run in RUNS if HELD_OUT.holds(run.workload.family, run.workload.source)]
TRAINING = [run for run in RUNS if run not in EVALUATION]


def kinds(runs: list[RunConfig]) -> set[tuple[str, str]]:
    return {(run.workload.family, run.workload.source) for run in runs}


def values(field: str, runs: list[RunConfig]) -> set[object]:
    return {getattr(run.workload.recipe, field) for run in runs}


def is_transfer(run: RunConfig) -> bool:
    return run.reference.endswith("-transfer") or run.reference.startswith("lite")


def test_it_has_as_many_runs_as_it_says_and_none_twice() -> None:
    text = suite_path("gathered").read_text()
    tables = tomllib.loads(text)["runs"]
    asked = sum(math.prod(len(value) for value in table.values() if isinstance(value, list)) for table in tables)
    assert asked == len(RUNS) == len({run.id for run in RUNS})
    assert f"# {len(TRAINING)} runs for training and {len(EVALUATION)} for evaluation" in text
    assert 160 <= len(TRAINING) <= 200
    assert 40 <= len(EVALUATION) <= 50


def test_every_source_exists() -> None:
    wholes = {run.workload.source.removesuffix("-first").removesuffix("-last") for run in RUNS}
    assert wholes <= set(SOURCES)


def test_training_runs_are_of_no_held_out_family_and_nothing_of_fashion() -> None:
    assert {family for family, _ in kinds(TRAINING)} == {
        "mlp",
        "vgg",
        "densenet",
        "mixer",
        "convnext",
        "vit",
        "textcnn",
    }
    assert {source for _, source in kinds(TRAINING)} == {
        "digits", "digits-last", "mnist-5k", "mnist-5k-last", "glosses", "glosses-last",
    }  # fmt: skip
    pretrained_on = {TRANSFERS[run.reference.removesuffix("-transfer")].source for run in TRAINING if is_transfer(run)}
    assert pretrained_on == {"digits", "mnist-5k", "glosses"}


def test_evaluation_runs_are_new_in_family_or_in_source() -> None:
    assert {run.reference for run in EVALUATION if run.workload.family in HELD_OUT.families} == {
        "resnet8-fashion", "resnet14-fashion", "resnet20-fashion", "resnet20-transfer", "resnet8-digits",
        "mobilenet-fashion", "mobilenet-digits", "texttransformer-glosses", "lite0-fashion",
    }  # fmt: skip
    known = [run for run in EVALUATION if run.workload.family not in HELD_OUT.families]
    assert {run.workload.source for run in known} == {"fashion", "fashion-last"}
    assert {run.workload.family for run in known} == {"mlp", "vgg", "densenet", "mixer", "convnext", "vit"}
    assert {run.workload.source for run in EVALUATION if run.workload.family == "resnet"} == {
        "fashion", "fashion-last", "digits",
    }  # fmt: skip


def test_every_family_is_trained_from_scratch_and_fine_tuned_with_either_optimizer() -> None:
    for family in {family for family, _ in kinds(TRAINING)}:
        runs = [run for run in TRAINING if run.workload.family == family]
        kinds_of_run = {(is_transfer(run), run.workload.recipe.optimizer) for run in runs}
        assert kinds_of_run == {(start, optimizer) for start in (False, True) for optimizer in ("sgd", "adamw")}, family
        assert values("schedule", runs) == {"cosine", "linear", "constant"}, family
        assert len(values("lr", runs)) >= 4, family
        assert len(values("batch_size", runs)) >= 2, family
        assert len(values("weight_decay", runs)) >= 3, family
        assert max(values("epochs", runs)) >= 15, family
    assert {16, 32, 64, 128} <= values("batch_size", TRAINING)
    assert (min(values("epochs", TRAINING)), max(values("epochs", TRAINING))) == (5, 40)
    assert values("label_smoothing", TRAINING) == {0.0, 0.1}
    assert sum(is_transfer(run) for run in TRAINING) >= len(TRAINING) / 4
    assert {is_transfer(run) for run in EVALUATION} == {True, False}

"""Made-up but realistic results of a suite: three workloads, five policies, three seeds, one training diverged."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKLOADS = {
    "digits-mlp": (0.962, 6, 14.0),
    "fashion-resnet8": (0.894, 9, 96.0),
    "glosses-transformer": (0.813, 12, 61.0),
}
"""Name -> accuracy of the baseline, layers, CPU seconds."""
POLICIES = {
    "none": (0.0, 0.0, 1.0),
    "shorter 0.7": (-0.014, 0.0, 0.7),
    "static 0.5": (-0.031, 0.0, 1.0),
    "linear": (-0.006, 0.5, 1.0),
    "smartfrz": (-0.0012, 0.3, 1.0),
}
"""Label -> accuracy difference, progress at which freezing begins, share of the planned steps."""
STEPS = 1200


def write_suite(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a suite's folder with `rows` as its trials; `changes` are made to suite.json."""
    suite = {
        "name": "Made-up suite",
        "baseline": "none",
        "margin": 0.005,
        "cost": "cpu_seconds",
        "workloads": list(dict.fromkeys(row["workload"] for row in rows)),
        "policies": list(dict.fromkeys(row["policy"] for row in rows)),
        "seeds": sorted({row["seed"] for row in rows}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.json").write_text(json.dumps(suite | changes))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made_up_trial(workload: str, policy: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One line of results.jsonl, the same at every call."""
    chance = random.Random(f"{workload}/{policy}/{seed}")
    accuracy, layer_count, cpu_seconds = WORKLOADS.get(workload, (0.9, 8, 50.0))
    loss_of_accuracy, begins, budget = POLICIES.get(policy, (-chance.uniform(0, 0.02), chance.uniform(0.1, 0.8), 1.0))
    accuracy += random.Random(f"{workload}/{seed}").gauss(0, 0.003) + loss_of_accuracy + chance.gauss(0, 0.0008)
    steps = round(STEPS * budget)
    freezes = _freezes(policy, layer_count, begins, chance)
    step_cost, seconds = _step_cost(freezes, layer_count, steps, cpu_seconds / STEPS, chance)
    row = {
        "trial_id": f"{workload}-{policy}-{seed}",
        "workload": workload,
        "family": workload.split("-")[-1],
        "source": workload.split("-")[0],
        "policy": policy,
        "policy_name": policy.split(" ")[0],
        "policy_options": {},
        "seed": seed,
        "status": "finished",
        "error": None,
        "accuracy": accuracy,
        "loss": 0.31 - loss_of_accuracy,
        "train_seconds": seconds * 1.04,
        "cpu_seconds": seconds,
        "policy_seconds": seconds * (0.012 if policy == "smartfrz" else 0.0004),
        "flops": int(seconds * 2.1e10),
        "peak_memory_bytes": 310_000_000,
        "steps": steps,
        "planned_steps": STEPS,
        "parameters": 78_042,
        "curve": _curve(accuracy, steps, seconds, chance),
        "layers": [f"stages.{index}.convolution" for index in range(layer_count)],
        "freezes": freezes,
        "patterns": [],
        "step_cost": step_cost,
        "slots": 2,
        "config": {
            "recipe": {"epochs": 10, "lr": 0.1, "batch_size": 64},
            "source": workload.split("-")[0],
            "policy": entry(policy),
            "workload": workload,
            "seed": seed,
        },
        "versions": {"smartfrz": "0.1.0", "torch": "2.14.1", "python": "3.11.2"},
        "hardware": {"cpu": "Some CPU @ 2.5 GHz", "cores": 2, "gpu": None},
        "started": "2026-01-05T10:00:00+00:00",
    }
    return row | changes


def entry(label: str, **changes: Any) -> dict[str, Any]:
    """What a trial's configuration says of its policy, as far as the label says it."""
    name, _, cached = label.partition(", ")
    return {"name": name.split(" ")[0], "label": label, "options": {}, **({"cache": True} if cached else {}), **changes}


def diverged(row: dict[str, Any]) -> dict[str, Any]:
    """The same trial, had its loss become infinite after 40 % of the steps."""
    stop = round(0.4 * row["steps"])
    curve = [point for point in row["curve"] if point["step"] <= stop]
    curve.append(curve[-1] | {"step": stop, "train_loss": 1e12, "test_loss": float("nan"), "test_accuracy": 0.1})
    parts = {name: [part for part in row[name] if part["step"] <= stop] for name in ("freezes", "step_cost")}
    ends = {"status": "diverged", "accuracy": None, "loss": None, "steps": stop}
    return row | ends | parts | {"curve": curve, "error": f"loss is nan after step {stop}"}


def _freezes(policy: str, layers: int, begins: float, chance: random.Random) -> list[dict[str, Any]]:
    if policy == "static 0.5":
        return [_freeze(0, set(), set(range(layers // 2)))]
    frozen: set[int] = set()
    events = []
    for index in range(layers - 1) if begins else ():
        step = round(STEPS * (begins + (1 - begins) * (index + chance.random()) / layers))
        events.append(_freeze(step, frozen, frozen | {index}))
        frozen = frozen | {index}
    if policy == "smartfrz" and len(events) > 3:  # one layer unfreezes again, and one freezes out of order
        events[2:2] = [
            _freeze(events[1]["step"] + 9, {0, 1}, {0}),
            _freeze(events[1]["step"] + 40, {0}, {0, 1, layers - 2}),
        ]
    return events


def _freeze(step: int, before: set[int], after: set[int]) -> dict[str, Any]:
    return {"step": step, "froze": sorted(after - before), "thawed": sorted(before - after), "frozen": sorted(after)}


def _step_cost(
    freezes: list[dict[str, Any]], layers: int, steps: int, full: float, chance: random.Random
) -> tuple[list[dict[str, Any]], float]:
    """Bins of the mean step cost, and the seconds of the whole training."""
    bins, total = [], 0.0
    for end in range(steps // 50, steps + 1, steps // 50):
        frozen = max((len(event["frozen"]) for event in freezes if event["step"] < end), default=0)
        seconds = full * (1 - 0.6 * frozen / layers) * chance.gauss(1, 0.02)
        bins.append({"step": end, "seconds": seconds * 1.04, "cpu_seconds": seconds})
        total += seconds * (steps // 50)
    return bins, total


def _curve(accuracy: float, steps: int, seconds: float, chance: random.Random) -> list[dict[str, Any]]:
    points = []
    for epoch in range(1, 11):
        loss = 0.28 + 1.9 * math.exp(-epoch / 2.2) + chance.gauss(0, 0.015)
        point = {"step": epoch * steps // 10, "epoch": epoch, "train_loss": loss - 0.06 * epoch / 10, "test_loss": loss}
        gained = accuracy - 0.5 * math.exp(-epoch / 1.6)
        points.append(point | {"test_accuracy": gained, "train_seconds": seconds * epoch / 10})
    return points


HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>$\\frac{$ {{ 7*7 }} 名前 🚀 """ + "x" * 150
"""A label that is markup, a formula, a template, in other scripts, and too long."""


def whole_suite() -> list[dict[str, Any]]:
    trials = [made_up_trial(name, policy, seed) for seed in range(3) for name in WORKLOADS for policy in POLICIES]
    lost = "glosses-transformer-linear-2"
    return [diverged(row) if row["trial_id"] == lost else row for row in trials]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """The trials of the whole suite; linear diverged on the transformer with seed 2."""
    return whole_suite()


@pytest.fixture
def folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """The suite's folder, as run-suite leaves it."""
    return write_suite(tmp_path / "suite", rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write_suite` into a folder of its own."""
    return lambda rows, **changes: write_suite(tmp_path / "other", rows, **changes)


@pytest.fixture
def trial() -> Callable[..., dict[str, Any]]:
    """`made_up_trial`."""
    return made_up_trial


@pytest.fixture
def oracle() -> Callable[..., Path]:
    """`write_oracle`."""
    return write_oracle


@pytest.fixture
def told() -> Callable[..., dict[str, Any]]:
    """`entry`."""
    return entry


@pytest.fixture
def lost() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`diverged`."""
    return diverged


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the whole suite."""
    from evaluate.report.page import make_report

    return make_report(write_suite(tmp_path_factory.mktemp("whole"), whole_suite()))


MANY_FAMILIES = (
    *("shorter", "static", "random", "linear", "gradual", "freezeout", "spfde", "autofreeze", "pipetransformer"),
    *("greentrainer", "slimfit", "lisa", "egeria", "simfreeze", "smartfrz"),
    *("static, cached", "linear, cached", "egeria, cached", "simfreeze, cached", "smartfrz, cached"),
)
"""Twenty: with two settings each, the first four with three, and the baseline, 45 policies."""


def many_rows() -> list[dict[str, Any]]:
    """A workload and two seeds under 45 policies."""
    labels = ["none"]
    for index, family in enumerate(MANY_FAMILIES):
        name, comma, cached = family.partition(", ")
        labels += [f"{name} {setting}{comma}{cached}" for setting in (0.3, 0.5, 0.7)[: 3 if index < 4 else 2]]
    return [made_up_trial("digits-mlp", label, seed) for seed in range(2) for label in labels]


@pytest.fixture(scope="session")
def many_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 45 policies, with an oracle of its workload."""
    from evaluate.report.page import make_report

    folder = tmp_path_factory.mktemp("many")
    write_oracle(folder / "oracle", "digits-mlp")
    return make_report(write_suite(folder / "suite", many_rows()))


def write_oracle(folder: Path, workload: str, **changes: Any) -> Path:
    """An oracle's file for a made-up workload: 40 % of the FLOPs for 1 point, 70 % for none."""
    cheap = {"flops_share": 0.4, "difference": -0.01, "accuracy": 0.9, "fronts": [[0.2, 0.5]]}
    safe = {"flops_share": 0.7, "difference": 0.0, "accuracy": 0.91, "fronts": [[0.5, 0.5]]}
    row = made_up_trial(workload, "none", 0)
    facts = {"workload": workload, "recipe": row["config"]["recipe"], "source": row["config"]["source"]}
    content = facts | {"seeds": [0, 1, 2], "tried": 60, "front": [cheap, safe]} | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{workload}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one seed under 20 policies, where every name that there is attacks the page."""
    from evaluate.report.page import make_report

    names = [
        "none",
        HOSTILE,
        "line\nbreak",
        "\x1b[31mred",
        r"$\frac{$",
        *(f"policy {HOSTILE[:25]} {number}" for number in range(15)),
    ]
    rows = [made_up_trial(HOSTILE, name, 0, versions={HOSTILE: HOSTILE}, config={"a": HOSTILE}) for name in names]
    rows[4:] = [row | {"freezes": []} for row in rows[4:]]
    rows[3] = rows[3] | {"status": "failed", "error": HOSTILE, "accuracy": None}
    return make_report(write_suite(tmp_path_factory.mktemp("hostile"), rows, name=HOSTILE))

"""Reads a suite's folder: suite.json and results.jsonl into typed rows, with every line that is not used named."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from predictor.errors import FileFault

COST_AXES = {"train_seconds": "wall-clock seconds", "cpu_seconds": "CPU seconds", "flops": "FLOPs"}
"""The measures of what a training costs, and how they are called."""
ADOPTED = "adopted"
"""The key of a result that says that it was taken over: its seconds are another machine's."""
ACCOUNTING = 3
"""Grows when what is counted into a trial's costs changes, so that trials counted otherwise are run again."""
MALFORMED = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
"""What reading nonsense raises."""
_STATUSES = ("finished", "diverged", "failed")
_COSTS = ("train_seconds", "cpu_seconds", "policy_seconds", "flops", "peak_memory_bytes")
_MOST = 1 << 53  # of steps and the like: beyond it, floating-point arithmetic loses count


@dataclass(frozen=True)
class Suite:
    """What was to be run and how it is judged."""

    name: str
    baseline: str
    """The policy that every other is compared with."""
    margin: float
    """How much accuracy (a share of 1) may be lost and the policy still counts as accurate."""
    cost: str
    """The measure of training cost, a key of COST_AXES."""
    workloads: tuple[str, ...]
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    against: str = ""
    """The family whose area the others' are compared with; empty for that of training for fewer steps."""


@dataclass(frozen=True)
class Reading:
    """One evaluation during a training. What was not measured, or was not a finite number, is None."""

    step: int
    train_loss: float | None
    test_loss: float | None
    test_accuracy: float | None


@dataclass(frozen=True)
class Freeze:
    """The whole set of frozen layers after a change."""

    step: int
    frozen: frozenset[int]


@dataclass(frozen=True)
class StepCost:
    """The mean cost of the optimizer steps that end at `step`."""

    step: int
    train_seconds: float | None
    cpu_seconds: float | None


@dataclass(frozen=True)
class Trial:
    """One training of a workload under a policy with a seed."""

    trial_id: str
    workload: str
    policy: str
    seed: int
    status: str
    error: str
    accuracy: float | None
    loss: float | None
    train_seconds: float | None
    cpu_seconds: float | None
    policy_seconds: float | None
    flops: float | None
    peak_memory_bytes: float | None
    steps: int
    planned_steps: int
    """Steps of the whole training without any policy: the length of the time axis."""
    curve: tuple[Reading, ...]
    layers: tuple[str, ...]
    freezes: tuple[Freeze, ...]
    step_cost: tuple[StepCost, ...]
    hit_share: float | None
    """Share of the samples for which a cache skipped the frozen front; None without a cache."""
    slots: int
    """Trials that shared the machine's cores, or the GPU, at a time."""
    adopted: bool
    """Whether it was taken over from elsewhere: its seconds are another machine's."""
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    hardware: Mapping[str, Any]

    def cost(self, axis: str) -> float | None:
        """The training's cost on an axis of COST_AXES, in seconds or FLOPs; None where it was not measured."""
        cost: float | None = getattr(self, axis)
        return cost


@dataclass(frozen=True)
class Results:
    """A suite and its trials. `faults` names every line that could not be used."""

    suite: Suite
    trials: tuple[Trial, ...]
    faults: tuple[str, ...]

    @cached_property
    def workloads(self) -> tuple[str, ...]:
        """Those of the suite in its order, then others that the results hold."""
        return tuple(dict.fromkeys([*self.suite.workloads, *(trial.workload for trial in self.trials)]))

    @cached_property
    def policies(self) -> tuple[str, ...]:
        """The baseline, those of the suite in its order, then others that the results hold."""
        seen = (trial.policy for trial in self.trials)
        return tuple(dict.fromkeys([self.suite.baseline, *self.suite.policies, *seen]))

    @cached_property
    def _cells(self) -> dict[tuple[str, str], dict[int, Trial]]:
        cells: dict[tuple[str, str], dict[int, Trial]] = {}
        for trial in self.trials:
            cells.setdefault((trial.workload, trial.policy), {})[trial.seed] = trial
        return cells

    def cell(self, workload: str, policy: str) -> Mapping[int, Trial]:
        """The trials of a workload under a policy, by seed."""
        return self._cells.get((workload, policy), {})

    def planned(self, workload: str, policy: str) -> int:
        """How many trials the suite plans for a workload under a policy, or were run beyond the plan."""
        inside = workload in self.suite.workloads and policy in self.suite.policies
        seeds = {*self.cell(workload, policy), *(self.suite.seeds if inside else ())}
        return len(seeds)

    def missing(self) -> list[tuple[str, str, int]]:
        """Workload, policy and seed of the planned trials that were not run."""
        return [
            (workload, policy, seed)
            for workload in self.suite.workloads
            for policy in self.suite.policies
            for seed in self.suite.seeds
            if seed not in self.cell(workload, policy)
        ]


def read_results(folder: Path, cost: str | None = None, against: str = "") -> Results:
    """Read what `python -m evaluate run-suite` left in `folder`.

    cost: the measure to compare by, a key of COST_AXES; the suite's own by default. against: a Suite's.

    A line of results.jsonl that is cut short or makes no sense is left out and named in `faults`. Of several lines with
    the same workload, policy and seed the last one counts: it is the trial that was run again. Raises FileFault where
    one of the two files is missing or suite.json is broken.
    """
    suite = _suite(folder / "suite.json")
    suite = replace(suite, cost=suite.cost if cost is None else cost, against=against)
    path = folder / "results.jsonl"
    trials: dict[tuple[str, str, int], Trial] = {}
    faults = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        try:
            if line.strip():
                trial = trial_of(json.loads(line))
                trials[trial.workload, trial.policy, trial.seed] = trial
        except json.JSONDecodeError:
            faults.append(f"{path.name}, line {number}: cut short, or not JSON")
        except MALFORMED as error:
            faults.append(f"{path.name}, line {number}: {error}")
    return Results(suite, tuple(trials.values()), tuple(faults))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        cure = "name a folder that `python -m evaluate run-suite` wrote"
        raise FileFault(f"{path}: cannot be read ({error.strerror}): {cure}") from error


def _suite(path: Path) -> Suite:
    try:
        row = json.loads(_text(path))
        suite = Suite(
            name=_string(row, "name"),
            baseline=_string(row, "baseline"),
            margin=_need(_number(row, "margin"), "margin"),
            cost=_string(row, "cost"),
            workloads=tuple(str(name) for name in row["workloads"]),
            policies=tuple(str(name) for name in row["policies"]),
            seeds=tuple(int(seed) for seed in row["seeds"]),
        )
    except MALFORMED as error:
        raise FileFault(f"{path}: not a suite's description ({error}): run the suite again to write it anew") from error
    if suite.cost not in COST_AXES:
        raise FileFault(f"{path}: cost {suite.cost!r} is unknown: it is one of {', '.join(COST_AXES)}")
    return suite


def has_result(row: dict[str, Any]) -> bool:
    """Whether a line of results.jsonl need not be run again: not of a trial that failed, or was counted otherwise.

    Nor is it a result without the id of its trial, or without how many ran at a time.
    """
    told = isinstance(row.get("trial_id"), str) and type(row.get("slots")) is int
    return told and row.get("status") in ("finished", "diverged") and row.get("accounting") == ACCOUNTING


def trial_of(row: Any) -> Trial:
    """A line of results.jsonl. Raises one of MALFORMED where it makes no sense."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    parts: dict[str, Any] = {key: _number(row, key, 0) for key in _COSTS}
    parts |= {key: dict(row.get(key) or {}) for key in ("config", "versions", "hardware")}
    trial = Trial(
        trial_id=_string(row, "trial_id"),
        workload=_string(row, "workload"),
        policy=_string(row, "policy"),
        seed=_whole(row, "seed"),
        status=_string(row, "status"),
        error=str(row.get("error") or ""),
        accuracy=_number(row, "accuracy", 0, 1),
        loss=_number(row, "loss"),
        steps=_count(row, "steps", 0),
        planned_steps=_count(row, "planned_steps", 0),
        slots=_count(row, "slots", 1),
        adopted=bool(row.get(ADOPTED)),
        curve=tuple(_reading(point) for point in row.get("curve") or ()),
        layers=tuple(str(name) for name in row.get("layers") or ()),
        freezes=tuple(Freeze(_count(f, "step"), frozenset(map(int, f["frozen"]))) for f in row.get("freezes") or ()),
        step_cost=tuple(_step_cost(point) for point in row.get("step_cost") or ()),
        hit_share=_hit_share(row.get("cache")),
        **parts,
    )
    if trial.status not in _STATUSES:
        raise ValueError(f"status {trial.status!r} is unknown")
    if trial.status == "finished" and trial.accuracy is None:
        raise ValueError("finished without an accuracy")
    return trial


def _reading(row: Any) -> Reading:
    train_loss, test_loss = _number(row, "train_loss"), _number(row, "test_loss")
    return Reading(_count(row, "step"), train_loss, test_loss, _number(row, "test_accuracy", 0, 1))


def _step_cost(row: Any) -> StepCost:
    return StepCost(_count(row, "step"), _number(row, "seconds", 0), _number(row, "cpu_seconds", 0))


def _hit_share(row: Any) -> float | None:
    if row is None:
        return None
    hits, misses = _count(row, "hits"), _count(row, "misses")
    return hits / max(hits + misses, 1)


def _number(row: Any, key: str, least: float = -math.inf, most: float = math.inf) -> float | None:
    """A finite number from `least` to `most`; None for null, NaN and infinity."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, not a number")
    if not math.isfinite(value):
        return None
    if not least <= value <= most:
        raise ValueError(f"{key} is {value!r}, not from {least:g} to {most:g}")
    return float(value)


def _need(value: float | None, key: str) -> float:
    if value is None:
        raise ValueError(f"{key} is missing")
    return value


def _count(row: Any, key: str, default: int | None = None) -> int:
    """A whole number of steps or the like."""
    value = _whole(row, key, default)
    if not 0 <= value <= _MOST:
        raise ValueError(f"{key} is {value}, not from 0 to {_MOST}")
    return value


def _whole(row: Any, key: str, default: int | None = None) -> int:
    value = row.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def _string(row: Any, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} is {value!r}, not a name")
    return value

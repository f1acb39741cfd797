"""Reads a suite's folder: suite.json and results.jsonl into typed rows, with every line that is not used named."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, StringConstraints

from data.validation import validated
from predictor.errors import FileFault

COST_AXES = {"train_seconds": "wall-clock seconds", "cpu_seconds": "CPU seconds", "flops": "FLOPs"}
"""The measures of what a training costs, and how they are called."""
ADOPTED = "adopted"
"""The key of a result that says that it was taken over: its seconds are another machine's."""
ACCOUNTING = 3
"""Grows when what is counted into a trial's costs changes, so that trials counted otherwise are run again."""
MALFORMED = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
"""What reading nonsense raises."""
_LARGEST = 1e300  # of costs: beyond it, a sum of them overflows
_MOST = 1 << 53  # of steps and the like: beyond it, floating-point arithmetic loses count


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_Finite = BeforeValidator(_finite)
"""Infinity and NaN, which JSON files of before may hold, count as not measured."""
_Number = Annotated[float | None, _Finite]
_Cost = Annotated[Annotated[float, Field(ge=0, le=_LARGEST)] | None, _Finite]
_Share = Annotated[Annotated[float, Field(ge=0, le=1)] | None, _Finite]
_Count = Annotated[int, Field(ge=0, le=_MOST)]
Name = Annotated[str, StringConstraints(min_length=1)]
"""What names a workload, a policy or a trial, in a suite's file as in its results."""


def cell_seeds(suite: Sequence[int], workload: Sequence[int] | None, policy: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of a workload under a policy: those of the workload, or else of the suite, that the policy has too.

    A workload without seeds of its own has the suite's, and a policy without has all.
    """
    return tuple(seed for seed in workload or suite if not policy or seed in policy)


@dataclass(frozen=True)
class Suite:
    """What was to be run and how it is compared."""

    name: Name
    baseline: Name
    """The policy that every other is compared with."""
    margin: float
    """How much accuracy (a share of 1) may be lost and the policy still counts as accurate."""
    cost: Annotated[str, StringConstraints(pattern=f"^({'|'.join(COST_AXES)})$")]
    """The measure of training cost, a key of COST_AXES."""
    workloads: tuple[str, ...]
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    against: str = ""
    """The family whose area the others' are compared with; empty for that of training for fewer steps."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """The group of each workload that has one."""
    workload_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The seeds of each workload that has its own."""
    policy_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Those of each policy that has its own."""

    def seeds_of(self, workload: str, policy: str) -> tuple[int, ...]:
        """The seeds with which a workload was to be trained under a policy."""
        return cell_seeds(self.seeds, self.workload_seeds.get(workload), self.policy_seeds.get(policy))


@dataclass(frozen=True)
class Reading:
    """One evaluation during a training. What was not measured, or was not a finite number, is None."""

    step: _Count
    train_loss: _Number = None
    test_loss: _Number = None
    test_accuracy: _Share = None


@dataclass(frozen=True)
class Freeze:
    """The whole set of frozen layers after a change."""

    step: _Count
    frozen: frozenset[int]


@dataclass(frozen=True)
class StepCost:
    """The mean cost of the optimizer steps that end at `step`."""

    step: _Count
    seconds: _Cost = None
    cpu_seconds: _Cost = None


@dataclass(frozen=True)
class CacheUse:
    """How many samples' frozen prefix a feature cache skipped, and how many it did not."""

    hits: _Count
    misses: _Count


@dataclass(frozen=True)
class Trial:
    """One training of a workload under a policy with a seed: a line of results.jsonl, as far as the report reads it."""

    trial_id: Name
    workload: Name
    policy: Name
    seed: int
    status: Literal["finished", "diverged", "failed"]
    error: str = ""
    accuracy: _Share = None
    loss: _Number = None
    train_seconds: _Cost = None
    cpu_seconds: _Cost = None
    policy_seconds: _Cost = None
    flops: _Cost = None
    peak_memory_bytes: _Cost = None
    steps: _Count = 0
    planned_steps: _Count = 0
    """Steps of the whole training without any policy: the length of the time axis."""
    curve: tuple[Reading, ...] = ()
    layers: tuple[str, ...] = ()
    freezes: tuple[Freeze, ...] = ()
    step_cost: tuple[StepCost, ...] = ()
    cache: CacheUse | None = None
    """None without a feature cache."""
    slots: _Count = 1
    """Trials that shared the machine's cores, or the GPU, at a time."""
    adopted: bool = False
    """Whether it was taken over from elsewhere: its seconds are another machine's."""
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status == "finished" and self.accuracy is None:
            raise ValueError("finished without an accuracy")

    def cost(self, axis: str) -> float | None:
        """The training's cost on an axis of COST_AXES, in seconds or FLOPs; None where it was not measured."""
        cost: float | None = getattr(self, axis)
        return cost

    @property
    def hit_share(self) -> float | None:
        """Share of the samples for which a cache skipped the frozen prefix; None without a cache."""
        return None if self.cache is None else self.cache.hits / max(self.cache.hits + self.cache.misses, 1)


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
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What the report calls each group of workloads, and its workloads; not one that holds all of them."""
        groups: dict[str, tuple[str, ...]] = {}
        for workload in self.workloads:
            if group := self.suite.groups.get(workload):
                name = f"all of {group}"
                groups[name] = (*groups.get(name, ()), workload)
        return {name: members for name, members in groups.items() if len(members) < len(self.workloads)}

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

    @property
    def seed_count(self) -> str:
        """With how many seeds the workloads' baselines finished, in words: such as 5, or 8 to 32."""
        cells = [self.cell(workload, self.suite.baseline) for workload in self.workloads]
        counts = [count for cell in cells if (count := sum(trial.status == "finished" for trial in cell.values()))]
        return " to ".join(dict.fromkeys(map(str, (min(counts), max(counts))))) if counts else "0"

    def planned(self, workload: str, policy: str) -> int:
        """How many trials the suite plans for a workload under a policy, or were run beyond the plan."""
        inside = workload in self.suite.workloads and policy in self.suite.policies
        seeds = {*self.cell(workload, policy), *(self.suite.seeds_of(workload, policy) if inside else ())}
        return len(seeds)

    def missing(self) -> list[tuple[str, str, int]]:
        """Workload, policy and seed of the planned trials that were not run."""
        return [
            (workload, policy, seed)
            for workload in self.suite.workloads
            for policy in self.suite.policies
            for seed in self.suite.seeds_of(workload, policy)
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
    text = _text(path)
    try:
        content = json.loads(text)
    except MALFORMED as error:
        raise FileFault(f"{path}: not JSON ({error}): run the suite again to write it anew") from error
    return validated(Suite, content, f"{path}: not a suite's description", FileFault)


def has_result(row: dict[str, Any]) -> bool:
    """Whether a line of results.jsonl is a result: not of a trial that failed, or whose costs were counted differently.

    Nor is a line without how many ran at a time, or one that the report leaves out.
    """
    if row.get("status") not in ("finished", "diverged") or row.get("accounting") != ACCOUNTING or "slots" not in row:
        return False
    try:
        trial_of(row)
    except MALFORMED:
        return False
    return True


def trial_of(row: Any) -> Trial:
    """A line of results.jsonl. Raises one of MALFORMED where it makes no sense."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    known = {key: value for key, value in row.items() if key in Trial.__dataclass_fields__}
    return _validated(Trial, {key: value for key, value in known.items() if value is not None or key == "slots"})


T = TypeVar("T")


def _validated(kind: type[T], row: Any) -> T:
    """As `validated`, with the first complaint alone: it stands in a list of them."""
    try:
        return validated(kind, row, "", ValueError)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0].removeprefix(": ")) from error

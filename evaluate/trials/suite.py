"""Suite files: which workloads are trained under which policies with which seeds, and how the results are judged."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import tomllib

from collect.gather.plan import suite_path
from collect.training.state import Scores
from evaluate.trials.freezing import CacheForm
from predictor.errors import FileFault, UsageError, unknown

SUITES = Path(__file__).parents[1] / "suites"
_SHIPPED = "shipped"


@dataclass(frozen=True)
class WorkloadEntry:
    """What is trained: a workload, and what the suite changes of it."""

    name: str
    """A name that `collect.workloads.load_workload` knows."""
    label: str
    """What tables and plots call it; the name by default."""
    source: str | None = None
    """Another data source than the workload's own."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that are changed."""


@dataclass(frozen=True)
class PolicyEntry:
    """What decides about freezing: a policy and its options."""

    name: str
    """A name that `predictor.policies.make_policy` knows."""
    label: str
    """What tables and plots call it; the name by default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The policy's options."""
    cache: bool | CacheForm = False
    """Whether what the frozen front makes of each sample is kept, so that its forward pass is skipped; and, where it is
    not kept as it is, in which form (`evaluate.trials.freezing.CacheHook`)."""
    stop: bool = False
    """Whether the training ends once every layer but the head is frozen."""
    lora: int | None = None
    """The rank of the LoRA adapters that are trained in place of the layers; None trains the layers."""
    lr_factor: float = 1.0
    """What the workload's learning rate is multiplied with: fewer weights want larger steps."""
    sieve: float = 0.0
    """The share of the training samples that each epoch leaves out, while the easiest and those left out change places
    (`collect.hooks.sieve.Sieve`): epochs are that much shorter, and there are as many."""
    sparse: float = 0.0
    """The share of each layer's weights that masks hold at zero, while they are pruned and grown
    (`collect.hooks.sparse_masks.SparseMasks`)."""

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes of a training besides freezing; only what is set, so that ids of other trials stay."""
        names = ("cache", "stop", "lora", "lr_factor", "sieve", "sparse")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(type(self), name)}


@dataclass(frozen=True)
class Suite:
    """A grid of trials. Every policy meets every workload with the same seeds, so that results can be paired."""

    name: str
    """Names the folder of the results too."""
    workloads: tuple[WorkloadEntry, ...]
    policies: tuple[PolicyEntry, ...]
    seeds: tuple[int, ...]
    baseline: str = "none"
    """The label of the policy that every other is compared with."""
    margin: float = 0.005
    """How much accuracy (a share of 1) may be lost and the policy still counts as accurate."""
    scores: Scores = "epoch"
    """When trials are tested: after each epoch, or at the end alone, where a test takes as long as the training."""
    shipped: bool = False
    """Whether it is about the predictor that ships, though another was trained here; one that is given comes first."""

    def cells(self) -> Iterable[tuple[int, WorkloadEntry, PolicyEntry]]:
        """Every trial's seed, workload and policy, in the order in which they run.

        Policies of the same workload and seed follow each other, so that what the machine does meanwhile meets all
        alike; seeds come last, so that a suite that is broken off has compared every policy with a few seeds.
        """
        return ((seed, work, policy) for seed in self.seeds for work in self.workloads for policy in self.policies)


def read_suite(name_or_path: str) -> Suite:
    """The suite of a name, or of a file of the user's own. Raises FileFault or UsageError that names what is wrong."""
    path = suite_path(name_or_path, SUITES)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return _suite(content)
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # TOML's and Unicode's errors, and ours from below
        raise FileFault(f"{path}: {error}") from error


def _suite(content: dict[str, Any]) -> Suite:
    known = ("name", "seeds", "baseline", "margin", "scores", "predictor", "recipe", "workloads", "policies")
    _only(content, known, "")
    shared = _typed(content, "recipe", dict, {})
    workloads = tuple(_workload(entry, shared) for entry in _entries(content, "workloads"))
    policies = tuple(_policy(entry) for entry in _entries(content, "policies"))
    baseline, margin = _typed(content, "baseline", str, "none"), _typed(content, "margin", float, 0.005)
    _distinct("workload", [entry.label for entry in workloads])
    labels = _distinct("policy", [entry.label for entry in policies])
    if baseline not in labels:
        raise UsageError(f"the baseline must be one of the suite's policies: {unknown('policy', baseline, labels)}")
    if not 0 <= margin < 1:
        raise UsageError(f"margin = {margin}: give a share of 1, such as 0.005 for half a percentage point")
    name, scores = _file_name(_typed(content, "name", str)), _typed(content, "scores", str, "epoch")
    if scores not in get_args(Scores):
        raise unknown("scores", scores, get_args(Scores))
    predictor = _typed(content, "predictor", str, None)
    if predictor not in (None, _SHIPPED):
        raise UsageError(f"predictor = {predictor!r}: write {_SHIPPED!r}, or leave it out and give --predictor PATH")
    return Suite(name, workloads, policies, _seeds(content), baseline, margin, scores, predictor == _SHIPPED)


def _workload(entry: str | dict[str, Any], shared: dict[str, Any]) -> WorkloadEntry:
    table = {"name": entry} if isinstance(entry, str) else entry
    _only(table, ("name", "label", "source", "recipe"), "workloads: ")
    name = _typed(table, "name", str)
    recipe = {**shared, **_typed(table, "recipe", dict, {})}
    return WorkloadEntry(name, _typed(table, "label", str, name), _typed(table, "source", str, None), recipe)


def _policy(entry: str | dict[str, Any]) -> PolicyEntry:
    table = {"name": entry} if isinstance(entry, str) else entry
    _only(table, ("name", "label", "options", "cache", "stop", "lora", "lr_factor", "sieve", "sparse"), "policies: ")
    name, lora, lr_factor = _typed(table, "name", str), _typed(table, "lora", int, None), _factor(table)
    if lora is not None and lora < 1:
        raise UsageError(f"lora = {lora}: give the adapters' rank, a whole number from 1")
    label, options = _typed(table, "label", str, name), _typed(table, "options", dict, {})
    sieve, sparse = _share(table, "sieve", "training samples to leave out"), _share(table, "sparse", "weights to mask")
    stop = _typed(table, "stop", bool, False)
    return PolicyEntry(name, label, options, _cache(table), stop, lora, lr_factor, sieve, sparse)


def _cache(table: dict[str, Any]) -> bool | CacheForm:
    cache = table.get("cache", False)
    forms = [form for form in get_args(CacheForm) if form != "exact"]  # which is `true`, so that ids are one
    if not isinstance(cache, bool) and cache not in forms:
        raise UsageError(f"cache = {cache!r}: give true or false, or one of {', '.join(forms)}")
    form: bool | CacheForm = cache
    return form


def _factor(table: dict[str, Any]) -> float:
    factor: float = _typed(table, "lr_factor", float, 1.0)
    if not 0 < factor < math.inf:
        raise UsageError(f"lr_factor = {factor}: give a number above 0 that the learning rate is multiplied with")
    return factor


def _share(table: dict[str, Any], key: str, what: str) -> float:
    share: float = _typed(table, key, float, 0.0)
    if not 0 <= share < 1:
        raise UsageError(f"{key} = {share}: give the share of the {what}, from 0 to below 1")
    return share


def _entries(content: dict[str, Any], key: str) -> list[str | dict[str, Any]]:
    entries: list[str | dict[str, Any]] = _typed(content, key, list)
    if not entries or not all(isinstance(entry, str | dict) for entry in entries):
        raise UsageError(f"{key}: give a list of names, or one [[{key}]] table for each")
    return entries


def _seeds(content: dict[str, Any]) -> tuple[int, ...]:
    seeds = _typed(content, "seeds", list)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds = {seeds}: give different whole numbers from 0, such as [0, 1, 2]")
    return tuple(seeds)


_MISSING = object()
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _typed(table: dict[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    if key not in table:
        if default is _MISSING:
            raise UsageError(f"{key} is missing")
        return default
    value = table[key]
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and type(value) is bool):
        raise UsageError(f"{key} = {value!r}: give {_WORDS[kind]}")
    return value


def _only(table: dict[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            raise UsageError(f"{where}{unknown('setting', key, known)}")


def _distinct(what: str, labels: list[str]) -> list[str]:
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"{what} {twice!r} comes twice: give each a label of its own")
    return labels


def _file_name(name: str) -> str:
    if not name or name.startswith(".") or not all(char.isalnum() or char in "._-" for char in name):
        raise UsageError(f"name = {name!r}: letters, digits, '.', '_' and '-' alone, because a folder is called so")
    return name

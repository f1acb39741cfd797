"""The best freezing that a search finds for one workload: schedules tried for accuracy and for FLOPs.

A schedule freezes a prefix before the first step, a number of tenths of the layers from none to all, and lets it grow
from one time to another, up to any tenth. The frozen prefix's features may be kept, and once all layers are frozen the
training may end or go on with the head alone. Optuna's TPE proposes a few schedules. Each is trained with every seed as
an ordinary trial of a suite, and the results guide the next proposals (Ozaki et al. 2022, "Multiobjective
tree-structured Parzen estimator"). The search is seeded and reads every result from the folder's results.jsonl, so the
same command proposes the same schedules again, finds them trained, and goes on where it was interrupted, or further
with more trials.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from collect.workloads import own_code
from data.validation import validated
from evaluate.analysis.oracle_file import Schedule, pareto
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.plan import Settings, make_plan
from evaluate.trials.records import Results, Trial, read_results
from evaluate.trials.run import run_suite
from evaluate.trials.suite import PolicyEntry, Seeds, Suite, WorkloadEntry, read_suite
from evaluate.trials.trial import build_workload
from predictor.errors import UsageError
from predictor.shared.files import write_json

if TYPE_CHECKING:
    import optuna

TENTHS = 10
"""Into which the layers are divided; a prefix is a number of them."""
_STEP = 0.05
"""Times are multiples of it, so that like schedules are one."""
_ROUND = 8
"""Schedules that are proposed, and trained side by side, before the search learns from them."""
_FIRST: tuple[dict[str, Any], ...] = (
    {"start": 0, "last": 10, "begin": 0.1, "over": 0.8, "cache": False},
    {"start": 2, "last": 10, "begin": 0.4, "over": 0.5, "cache": False},
    {"start": 4, "last": 10, "begin": 0.5, "over": 0.3, "cache": True, "stop": True},
    {"start": 4, "last": 4, "cache": True},
    {"start": 6, "last": 10, "begin": 0.5, "over": 0.4, "cache": True},
    {"start": 6, "last": 6, "cache": False},
    {"start": 8, "last": 8, "cache": True},
    {"start": 10, "last": 10, "cache": True},
)
"""Before the search proposes any: the whole range of costs, from few frozen layers to the head alone."""
_DEFAULTS: dict[str, Any] = {"begin": 0.5, "over": 0.0, "bend": 1.0, "stop": False}
_FULL = PolicyEntry("none", "none")

Prefixes = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Search:
    """What is searched, and how long."""

    workload: WorkloadEntry
    seeds: tuple[int, ...]
    trials: int
    """Schedules that are proposed."""
    scores: Any = "end"
    seed: int = 0
    """Of the proposals."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UsageError(f"trials={self.trials}: at least one schedule must be tried")
        validated(Seeds, list(self.seeds), "seeds")
        if "/" in self.workload.label:
            raise UsageError(f"workload {self.workload.label!r}: a file is called so: give it a label without '/'")


def make_search(workload: str, suite: str | None, seeds: Sequence[int] | None, trials: int) -> Search:
    """Set a search up. With a suite, its policies can be compared with what the search finds.

    Args:
        workload: A name of `collect.workloads`; with a suite, what the suite calls it.
        suite: The suite whose recipe, source and seeds are taken.
        seeds: Of the trainings of each schedule. Default: those of the suite's workload, or 0, 1 and 2.
        trials: How many schedules are tried.

    Raises:
        UsageError: The suite has no such workload.
    """
    if suite is None:
        return Search(WorkloadEntry(workload, workload), tuple((0, 1, 2) if seeds is None else seeds), trials)
    named = read_suite(suite)
    entry = next((entry for entry in named.workloads if entry.label == workload), None)
    if entry is None:
        known = ", ".join(entry.label for entry in named.workloads)
        raise UsageError(f"suite {named.name!r} has no workload {workload!r}: it has {known}")
    own = (entry.seeds or named.seeds) if seeds is None else tuple(seeds)
    return Search(replace(entry, seeds=None), own, trials, named.scores)


def find_oracle(search: Search, out: Path, settings: Settings, say: Callable[[str], None] = print) -> Path:
    """Search, and write `out`/LABEL.json.

    Args:
        search: What is searched.
        out: The folder. The trials are in `out`/LABEL, which is a suite's folder.
        settings: How trials are run.
        say: Takes a line on each round.

    Raises:
        UsageError: The workload does not work, or none of its trainings finished.
        FileFault: The folder cannot be written to.
    """
    folder = SuiteFolder(out / search.workload.label)
    entries = {_FULL.label: _FULL}
    study, proposed, keepable = _study(search.seed), 0, _keepable(search)
    while proposed < search.trials:
        asked = [study.ask() for _ in range(min(_ROUND, search.trials - proposed))]
        wanted = [_entry(proposal(trial, keepable)) for trial in asked]
        entries |= {entry.label: entry for entry in wanted}
        results = _train(search, tuple(entries.values()), folder, settings)
        for trial, entry in zip(asked, wanted, strict=True):
            _tell(study, trial, _measured(results, search, entry))
        proposed += len(asked)
        say(f"{proposed} of {search.trials} schedules tried")
    tried = [found for entry in entries.values() if (found := _measured(results, search, entry)) is not None]
    if not tried:
        raise UsageError(f"no training of {search.workload.label} finished: its logs are in {folder.root / 'logs'}")
    path = out / f"{search.workload.label}.json"
    write_json(path, _content(search, tried))
    return path


def _study(seed: int) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for first in _FIRST:
        study.enqueue_trial(_DEFAULTS | first)
    return study


def _keepable(search: Search) -> bool:
    """Whether a cache can keep the features: not where samples are augmented at random."""
    entry = search.workload
    return not build_workload(entry.name, entry.source, entry.recipe).recipe.augment


@dataclass(frozen=True)
class Proposal:
    """A schedule, and what else it changes of the training."""

    prefixes: Prefixes
    cache: bool = False
    stop: bool = False


def proposal(trial: "optuna.trial.BaseTrial", keepable: bool) -> Proposal:
    """What a trial proposes; nothing that would make no difference, so that like proposals are one."""
    prefixes = growing(
        trial.suggest_int("start", 0, TENTHS),
        trial.suggest_int("last", 0, TENTHS),
        trial.suggest_float("begin", 0.0, 1.0, step=_STEP),
        trial.suggest_float("over", 0.0, 1.0, step=_STEP),
        trial.suggest_categorical("bend", (0.5, 1.0, 2.0)),
    )
    cache = trial.suggest_categorical("cache", (False, True)) and keepable
    stop = trial.suggest_categorical("stop", (False, True))
    whole_from = next((time for time, share in prefixes if share == 1.0), 0.0)
    return Proposal(prefixes, bool(prefixes) and cache, stop and whole_from > 0)


def growing(start: int, last: int, begin: float, over: float, bend: float) -> Prefixes:
    """The option of the policy "schedule" for a prefix that is there from the first step and grows later.

    Args:
        start: Tenths of the layers that are frozen before the first step.
        last: Tenths up to which the prefix grows.
        begin: When it begins to grow, as progress.
        over: How long it grows. What would freeze from the end of the training on does not.
        bend: 1 grows evenly, less at first slowly, more at first quickly.
    """
    shares = {0.0: start} if start else {}
    steps = max(last - start, 0)
    for number in range(steps):
        time = begin + over * (number / max(steps - 1, 1)) ** bend
        shares[round(round(time / _STEP) * _STEP, 2)] = start + number + 1  # of several at one time the largest counts
    return tuple((time, tenths / TENTHS) for time, tenths in shares.items() if time < 1)


def _entry(proposed: Proposal) -> PolicyEntry:
    """Full training for a schedule that never freezes anything, which is trained anyway."""
    if not proposed.prefixes:
        return _FULL
    words = [f"{share:g} at {time:g}" for time, share in proposed.prefixes]
    words += [word for word, is_so in (("cached", proposed.cache), ("stop", proposed.stop)) if is_so]
    fronts = [list(each) for each in proposed.prefixes]
    label = f"schedule {', '.join(words)}"
    return PolicyEntry("schedule", label, {"fronts": fronts}, cache=proposed.cache, stop=proposed.stop)


def _train(search: Search, entries: tuple[PolicyEntry, ...], folder: SuiteFolder, settings: Settings) -> Results:
    """Train what has no result yet, as a suite that has grown by these schedules."""
    name = f"oracle-{search.workload.label}"
    suite = Suite(name, (search.workload,), entries, search.seeds, _FULL.label, scores=search.scores)
    run_suite(make_plan(suite, settings), folder, lambda figures, done: None)
    return read_results(folder.root)


def _measured(results: Results, search: Search, entry: PolicyEntry) -> Schedule | None:
    """A schedule's result beside full training; None if a training of either was lost."""
    label = search.workload.label
    full, own = results.cell(label, _FULL.label), results.cell(label, entry.label)
    numbers = [_numbers(full.get(seed), own.get(seed)) for seed in search.seeds]
    whole = [each for each in numbers if each is not None]
    if len(whole) < len(numbers):
        return None
    accuracy, difference, share = (fmean(column) for column in zip(*whole, strict=True))
    prefixes = tuple((time, part) for time, part in entry.options.get("fronts", ()))
    return Schedule(share, difference, accuracy, prefixes, bool(entry.cache), entry.stop)


def _numbers(full: Trial | None, own: Trial | None) -> tuple[float, float, float] | None:
    """Accuracy, its difference to full training, and the share of its FLOPs."""
    if full is None or own is None or full.accuracy is None or own.accuracy is None or not full.flops or not own.flops:
        return None
    return own.accuracy, own.accuracy - full.accuracy, own.flops / full.flops


def _tell(study: "optuna.Study", trial: "optuna.Trial", found: Schedule | None) -> None:
    import optuna

    if found is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, [found.accuracy, found.flops_share])


def _content(search: Search, tried: list[Schedule]) -> Mapping[str, Any]:
    workload = build_workload(search.workload.name, search.workload.source, search.workload.recipe)
    return {
        "workload": search.workload.label,
        "name": search.workload.name,
        **({"code": code} if (code := own_code(search.workload.name)) else {}),
        "recipe": asdict(workload.recipe),
        "source": workload.source,
        "seeds": list(search.seeds),
        "trials": search.trials,
        "tried": len(tried),
        "front": [asdict(each) for each in pareto(tried)],
        "uncached": [asdict(each) for each in pareto([each for each in tried if not each.cache])],
        "note": "The best of many on the test set: part of it is luck, and what was not tried may be better.",
    }


def written(front: Sequence[Schedule]) -> str:
    """The Pareto front as a table for a terminal."""
    rows = [
        (
            f"{each.flops_share:.0%}",
            f"{each.accuracy * 100:.2f}",
            f"{each.difference * 100:+.2f}",
            each.words,
        )
        for each in front
    ]
    header = ("FLOPs", "accuracy %", "difference, pp", "frozen layers")
    return tabulate(rows, header, tablefmt="plain", disable_numparse=True)

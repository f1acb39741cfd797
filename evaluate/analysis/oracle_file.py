"""What a search found to be the best freezing of a workload, as a file, and how much of its saving a policy reaches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.validation import validated
from evaluate.analysis.compute_multiplier import flops_on_curve, full_training_curve, policy_point
from evaluate.analysis.families import families, is_full_training, keeps_features
from evaluate.analysis.pareto import ROUNDING, unbeaten
from evaluate.analysis.statistics import Row
from evaluate.trials.records import Results
from predictor.errors import FileFault

_MOST_PARTS = 4
"""Times at which a schedule freezes that are named one by one."""


@dataclass(frozen=True)
class Schedule:
    """A schedule that a search tried, beside full training: means over the seeds."""

    flops_share: float
    """Its FLOPs over those of full training."""
    difference: float
    """Its accuracy less that of full training, a share of 1."""
    accuracy: float
    fronts: tuple[tuple[float, float], ...]
    """The option `fronts` of the policy "schedule"; empty: nothing freezes."""
    cache: bool = False
    """Whether the frozen prefix's features were kept."""
    stop: bool = False
    """Whether the training ended once all layers were frozen."""

    @property
    def words(self) -> str:
        """The schedule as a reader wants it: which part of the layers is frozen, and from when on."""
        grown = list(self.fronts)
        parts = [f"{share:.0%} from the start" for time, share in grown[:1] if time == 0]
        grown = grown[len(parts) :]
        if len(grown) > _MOST_PARTS:
            (first, low), (end, high) = grown[0], grown[-1]
            parts.append(f"from {low:.0%} to {high:.0%} between {first:.0%} and {end:.0%}")
        else:
            parts += [f"{share:.0%} from {time:.0%} on" for time, share in grown]
        parts = parts or ["nothing freezes"]
        return ", ".join([*parts, *(["cached"] if self.cache else []), *(["then ended"] if self.stop else [])])


@dataclass(frozen=True)
class Oracle:
    """The Pareto front of a workload's schedules, cheapest first.

    It is the best of those that were tried, chosen on the test set. Part of its accuracy is luck that another seed
    would not repeat, and what was not tried may be better: it is neither a rival nor a bound.
    """

    workload: str
    recipe: Mapping[str, Any]
    """What was trained; an oracle of another recipe says nothing."""
    source: str
    seeds: tuple[int, ...]
    tried: int
    """Different schedules that it is the best of."""
    front: tuple[Schedule, ...]
    name: str | None = None
    """What the workload is found by, where `workload` is what a suite calls it; None in files of before."""
    code: str = ""
    """A fingerprint of the user's own code of it; empty for a workload of the toolkit's."""

    uncached: tuple[Schedule, ...] = ()
    """The Pareto front of those that kept no features; empty in files of before, when none did."""

    def schedules(self, *, cached: bool) -> list[Schedule]:
        """The Pareto front, cheapest first: of all schedules, or of those that kept no features."""
        return list(self.front) if cached else pareto([each for each in self.front + self.uncached if not each.cache])

    def best_within(self, difference: float, *, cached: bool = True) -> Schedule | None:
        """The cheapest schedule that loses no more accuracy; None where none does.

        cached: whether it may keep features.
        """
        good = (each for each in self.schedules(cached=cached) if each.difference >= difference - ROUNDING)
        return next(good, None)

    def at_edge(self, best: Schedule, *, cached: bool = True) -> bool:
        """Whether nothing cheaper than a schedule was tried, so that the search ended at its edge, not at its best."""
        return best == self.schedules(cached=cached)[0]

    def saving(self, difference: float, *, cached: bool = True) -> float:
        """The largest share of the FLOPs that a schedule saves that loses no more accuracy; 0 where none does."""
        best = self.best_within(difference, cached=cached)
        return 0.0 if best is None else max(0.0, 1 - best.flops_share)


@dataclass(frozen=True)
class BestMultiplier:
    """The largest compute multiplier of an oracle's schedules."""

    value: float
    schedule: Schedule
    at_least: bool
    """Whether the schedule is more accurate than every length of full training."""


@dataclass(frozen=True)
class Saving:
    """Shares of full training's FLOPs that are saved."""

    own: float
    """By a policy; below 0 where it costs more."""
    oracle: float
    """By the oracle at the same accuracy."""


def pareto(schedules: list[Schedule]) -> list[Schedule]:
    """Those that no other matches in FLOPs and accuracy and beats in one of them, cheapest first."""
    return unbeaten(schedules, lambda each: each.flops_share, lambda each: each.difference)


def best_multiplier(oracle: Oracle, results: Results, workload: str) -> BestMultiplier | None:
    """The best that an oracle's schedules reach against the results' curve of full training.

    Schedules less accurate than the shortest length are left out: their multipliers would be bounds from above. None
    where there is no other, or no curve.
    """
    curve = full_training_curve(results, workload)
    full = None if curve is None else policy_point(results, workload, results.suite.baseline, curve)
    if curve is None or full is None:
        return None
    lengths = [(point.flops / full.flops, point.accuracy - full.accuracy) for point in curve.points]
    found = [(each, *flops_on_curve(lengths, each.difference)) for each in oracle.front]
    known = [BestMultiplier(flops / each.flops_share, each, side > 0) for each, flops, side in found if side >= 0]
    return max(known, key=lambda each: each.value, default=None)


def saving(row: Row, oracle: Oracle, margin: float, *, cached: bool = True) -> Saving | None:
    """What a policy saves on the oracle's workload, beside the oracle; None where not all of it was compared.

    A policy that loses at most the margin is compared with the cheapest schedule that loses at most the margin. One
    that loses more is compared with the cheapest schedule that loses no more than the policy. Where the policy keeps no
    features, the schedule keeps none either.
    """
    if row.difference is None or row.flops_share is None or row.gap:
        return None
    return Saving(1 - row.flops_share, oracle.saving(min(row.difference.mean, -margin), cached=cached))


def share_of_saving(savings: Sequence[Saving]) -> float | None:
    """The policy's saving over the oracle's, of one workload or of several that weigh the same.

    Sums over sums: on a workload where hardly anything can be saved a ratio of its own would outweigh all others. None
    where the oracle saves nothing. More than 1 is possible: the search tries few of all schedules.
    """
    best = sum(each.oracle for each in savings)
    return sum(each.own for each in savings) / best if best > 0 else None


def shares_of_saving(
    results: Results, rows: Sequence[Row], oracles: Mapping[str, Oracle]
) -> dict[tuple[str | None, str], float]:
    """`share_of_saving` by workload and policy; under the workload None, over all workloads with an oracle.

    A policy that was not compared on one of these has no share over all.
    """
    savings: dict[str, dict[str, Saving | None]] = {}
    cached = {label for family in families(results) if keeps_features(family) for label in family.members}
    for row in rows:
        if row.workload is not None and row.workload in oracles:
            found = saving(row, oracles[row.workload], results.suite.margin, cached=row.policy in cached)
            savings.setdefault(row.policy, {})[row.workload] = found
    shares: dict[tuple[str | None, str], float | None] = {}
    for policy, by_workload in savings.items():
        known = {name: each for name, each in by_workload.items() if each is not None}
        shares |= {(name, policy): share_of_saving([each]) for name, each in known.items()}
        if len(known) == len(oracles):
            shares[None, policy] = share_of_saving(list(known.values()))
    return {key: share for key, share in shares.items() if share is not None}


def oracles_beside(folder: Path) -> Path:
    """Where a suite's report looks for oracles: in `oracle` beside the suite's own folder, where they are written."""
    return folder.resolve().parent / "oracle"


def find_oracles(folder: Path, results: Results) -> tuple[dict[str, Oracle], list[str]]:
    """The oracles of the results' workloads in `folder`, by workload, and why others of them there are not used."""
    # The folder's names are compared with the workloads', which come from a file and may be no file names.
    paths = {path.stem: path for path in sorted(folder.glob("*.json"))}
    found, refused = {}, []
    for name in results.workloads:
        if name not in paths:
            continue
        try:
            oracle = read_oracle(paths[name])
        except FileFault as fault:
            refused.append(str(fault))
            continue
        trained = [trial.config for trial in results.cell(name, results.suite.baseline).values()]
        if why := _unfit(oracle, trained, results.suite.baseline):
            refused.append(f"{paths[name]}: {why}")
        else:
            found[name] = oracle
    return found, refused


def _unfit(oracle: Oracle, trained: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Why an oracle says nothing beside these trainings, the baseline's; empty where it fits.

    What it saves, it saves of full training of one network, and shares of that are taken of the baseline's cost.
    """
    if not trained:
        return f"no training under {baseline} to hold an oracle against: run the suite first"
    if not all(is_full_training(config.get("policy")) for config in trained):
        return f"an oracle is held against full training, and the baseline {baseline} is another: take none as baseline"
    if any(config.get("recipe") != oracle.recipe or config.get("source") != oracle.source for config in trained):
        return "the oracle of another recipe or source: search again with --suite"
    if not all(_same_network(oracle, config) for config in trained):
        return "the oracle of another network, or of other code of it: search again with --suite"
    return ""


def _same_network(oracle: Oracle, config: Mapping[str, Any]) -> bool:
    if oracle.name is None:
        return config.get("workload") == oracle.workload
    code = config.get("code")
    own = code.get("workload", "") if isinstance(code, Mapping) else ""
    return bool(config.get("workload") == oracle.name and own == oracle.code)


def read_oracle(path: Path) -> Oracle:
    """Read what `python -m evaluate oracle` wrote. Raises FileFault for any other file."""
    again = "not an oracle: run `python -m evaluate oracle` again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFault(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise FileFault(f"{path}: {again}: {error}") from error
    return validated(Oracle, content, f"{path}: {again}", FileFault)

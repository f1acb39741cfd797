"""What a search found to be the best freezing of a workload, as a file, and how much of its saving a policy reaches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.validation import validated
from evaluate.analysis.families import is_full_training
from evaluate.analysis.pareto import unbeaten
from evaluate.analysis.statistics import Row
from evaluate.trials.records import Results
from predictor.errors import FileFault

# A schedule that loses just what a policy loses, or just the margin, is within it.
_ROUNDING = 1e-12


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


@dataclass(frozen=True)
class Oracle:
    """The Pareto front of a workload's schedules, cheapest first.

    It is the best of many on the test set, so part of its accuracy is luck that another seed would not repeat: an
    upper limit of what freezing could save, not a rival.
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

    def saving(self, difference: float) -> float:
        """The largest share of the FLOPs that a schedule saves that loses no more accuracy; 0 where none does."""
        good = [each.flops_share for each in self.front if each.difference >= difference - _ROUNDING]
        return max(0.0, 1 - min(good, default=1.0))


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


def saving(row: Row, oracle: Oracle, margin: float) -> Saving | None:
    """What a policy saves on the oracle's workload, beside the oracle; None where not all of it was compared.

    A policy that loses at most the margin is compared with the cheapest schedule that loses at most the margin. One
    that loses more is compared with the cheapest schedule that loses no more than the policy.
    """
    if row.difference is None or row.flops_share is None or row.gap:
        return None
    return Saving(1 - row.flops_share, oracle.saving(min(row.difference.mean, -margin)))


def share_of_saving(savings: Sequence[Saving]) -> float | None:
    """The policy's saving over the oracle's, of one workload or of several that weigh the same.

    Sums over sums: on a workload where hardly anything can be saved a ratio of its own would outweigh all others. None
    where the oracle saves nothing. More than 1 is possible: the search tries few schedules, of whole prefixes alone.
    """
    best = sum(each.oracle for each in savings)
    return sum(each.own for each in savings) / best if best > 0 else None


def shares_of_saving(
    rows: Sequence[Row], oracles: Mapping[str, Oracle], margin: float
) -> dict[tuple[str | None, str], float]:
    """`share_of_saving` by workload and policy; under the workload None, over all workloads with an oracle.

    A policy that was not compared on one of these has no share over all.
    """
    savings: dict[str, dict[str, Saving | None]] = {}
    for row in rows:
        if row.workload is not None and row.workload in oracles:
            savings.setdefault(row.policy, {})[row.workload] = saving(row, oracles[row.workload], margin)
    shares: dict[tuple[str | None, str], float | None] = {}
    for policy, by_workload in savings.items():
        known = {name: [found] for name, found in by_workload.items() if found is not None}
        shares |= {(name, policy): share_of_saving(found) for name, found in known.items()}
        if len(known) == len(oracles):
            shares[None, policy] = share_of_saving([found for group in known.values() for found in group])
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

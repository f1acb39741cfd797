"""Families of policies: one policy at several settings, with the same kinds of changes to the training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluate.trials.records import Results
from predictor.errors import unknown

MANY = 12
"""Policies up to which each of them is drawn and named on its own; where there are more, families are."""
_FEWER_STEPS = ("shorter", "stopped")
_NO_CHANGE = ("name", "label", "options")
_WORDS = {"cache": "cached"}


@dataclass(frozen=True)
class Family:
    """A policy at its settings."""

    name: str
    """Different for each family: of a single setting its label, else the policy and what it changes."""
    policy: str
    """The policy's name; a label where the results do not say the name."""
    changes: tuple[str, ...]
    """What it changes of a training besides freezing, such as "cache" or "views cache"."""
    members: tuple[str, ...]
    """The labels of its settings, in the suite's order."""


def families(results: Results) -> tuple[Family, ...]:
    """The policies besides the baseline, by family, in the order in which the first of each stands in the suite.

    A number that a change has, such as the rank of adapters, is a setting like the policy's own options. What makes a
    family is the policy's name, which changes there are, and a word that one of them has, such as the kind of a cache.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for label in results.policies:
        if label != results.suite.baseline:
            groups.setdefault(_kind(results, label), []).append(label)
    taken = {labels[0] for labels in groups.values() if len(labels) == 1}
    found = []
    for (policy, changes), labels in groups.items():
        name = labels[0] if len(labels) == 1 else _name(policy, changes, labels, taken)
        taken.add(name)
        found.append(Family(name, policy, changes, tuple(labels)))
    return tuple(found)


def rival(found: Sequence[Family], against: str = "") -> Family | None:
    """The family of this name; by default simply training for fewer steps, which freezing has to beat.

    If both ways were tried, it is the one with the larger area; `families` are in that order. None if neither was.
    Raises UsageError for a name that no family has.
    """
    if against:
        named = next((family for family in found if family.name == against), None)
        if named is None:
            raise unknown("family of policies", against, [family.name for family in found])
        return named
    return next((family for family in found if family.policy in _FEWER_STEPS and not family.changes), None)


def colour_indices(results: Results) -> dict[str, int]:
    """Each policy's index among the colours and markers: 0 for the baseline, then one for all members of a family."""
    numbered = {label: index for index, family in enumerate(families(results), 1) for label in family.members}
    return {results.suite.baseline: 0} | numbered


def policy_names(results: Results) -> list[str]:
    """The names of the policies that were run, each once, the baseline's first."""
    return list(dict.fromkeys(_kind(results, label)[0] for label in results.policies))


def keeps_features(family: Family) -> bool:
    """Whether its trainings have a feature cache."""
    return any(change.split()[-1] == "cache" for change in family.changes)


def is_full_training(entry: Any) -> bool:
    """Whether a policy, as a trial's configuration says, freezes nothing and changes nothing of the training."""
    if not isinstance(entry, Mapping) or entry.get("options"):
        return False
    return entry.get("name") == "none" and not any(key not in _NO_CHANGE for key in entry)


def _kind(results: Results, label: str) -> tuple[str, tuple[str, ...]]:
    """The policy's name and its changes, as the first trial under that label says."""
    trials = (trial for workload in results.workloads for trial in results.cell(workload, label).values())
    entry = next((trial.config.get("policy") for trial in trials), None)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        return label, ()
    changes = (
        f"{value} {key}" if isinstance(value, str) else key for key, value in entry.items() if key not in _NO_CHANGE
    )
    return entry["name"], tuple(sorted(changes))


def _name(policy: str, changes: Sequence[str], labels: Sequence[str], taken: Collection[str]) -> str:
    """The name of a family of several settings. If another family has that name, all labels of this one."""
    own = [] if policy == "none" and changes else [policy]
    name = ", ".join([*own, *(_WORDS.get(change, change.replace("_", " ")) for change in changes)])
    return " / ".join(labels) if name in taken else name

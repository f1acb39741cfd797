"""Describes trajectory files on the terminal: the runs by workload, the labels, the versions, the fields."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from data.trajectories.folder import trajectory_files
from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from data.trajectories.schema import WRITTEN
from data.trajectories.trajectory import Trajectory

_MOST_VALUES = 4
_HEADER = ("workload", "family", "source", "runs", "diverged", "layers", "snapshots", "accuracy", "may be frozen")


@dataclass
class _Group:
    """The runs of one workload."""

    family: str
    source: str
    runs: int = 0
    diverged: int = 0
    layers: set[int] = field(default_factory=set)
    snapshots: set[int] = field(default_factory=set)
    accuracies: list[float] = field(default_factory=list)
    labels: int = 0
    positive: int = 0

    def add(self, trajectory: Trajectory, rule: LabelRule) -> None:
        self.runs += 1
        self.layers.add(len(trajectory.layer_names))
        self.snapshots.add(len(trajectory.step_T))
        if not trajectory.finished:
            self.diverged += 1
            return
        if trajectory.outcome["final_accuracy"] is not None:
            self.accuracies.append(trajectory.outcome["final_accuracy"])
        self.labels += int((~np.isnan(trajectory.similarity_TL)).sum())
        self.positive += int(rule.labels(trajectory.similarity_TL).sum())


def describe(paths: Sequence[Path], rule: LabelRule, *, progress: bool = False) -> str:
    """A summary of trajectory files and gather folders.

    Every run is read, and so verified, one at a time. Raises FileFault at the first that is not sound.
    """
    files = trajectory_files(paths)
    groups: dict[str, _Group] = {}
    facts: dict[str, Counter[str]] = defaultdict(Counter)
    versions = set()
    for path in files:
        with open_trajectories(path) as file:
            versions.add(str(file.version))
            for trajectory in tqdm(file, desc=f"reading {path}", unit="run", leave=False, disable=not progress):
                config = trajectory.config
                fresh = _Group(config["family"], config["source"])
                groups.setdefault(config["workload"], fresh).add(trajectory, rule)
                _note_facts(facts, trajectory)
    size = sum(path.stat().st_size for path in files)
    runs = sum(group.runs for group in groups.values())
    name = str(paths[0]) if len(paths) == 1 else f"{len(files)} files"
    title = f"{name}: {runs} runs, {size / 1e6:.1f} MB, format version {' and '.join(sorted(versions))}"
    parts = [title, _table(groups), _label_line(groups.values(), rule), *_fact_lines(facts), "", schema_table()]
    return "\n".join(parts) + "\n"


def schema_table() -> str:
    """The fields of a run, one a line."""
    rows = [[field.name, "x".join(field.dims), field.dtype[1:], field.unit, field.doc] for field in WRITTEN]
    return tabulate(rows, ("field", "shape", "type", "unit", "what it is"), "plain", disable_numparse=True)


def _table(groups: dict[str, _Group]) -> str:
    rows = [_row(name, group) for name, group in sorted(groups.items())]
    align = ["left"] * 3 + ["right"] * (len(_HEADER) - 3)
    return tabulate(rows, _HEADER, "plain", disable_numparse=True, colalign=align, headersalign=align)


def _row(name: str, group: _Group) -> tuple[str, ...]:
    accuracy = _span(group.accuracies, ".3f")
    counts = (str(group.runs), str(group.diverged), _span(group.layers, "d"), _span(group.snapshots, "d"))
    return (_clean(name), _clean(group.family), _clean(group.source), *counts, accuracy, _share([group]))


def _label_line(groups: Collection[_Group], rule: LabelRule) -> str:
    dip = f", and never more than {rule.dip} below it" if rule.dip else ""
    return (
        f"may be frozen (CKA to the final network at least {rule.threshold} from there to the end{dip}): "
        f"{_share(groups)} of {sum(group.labels for group in groups):,} snapshots of a layer in finished runs"
    )


def _share(groups: Collection[_Group]) -> str:
    labels = sum(group.labels for group in groups)
    return f"{100 * sum(group.positive for group in groups) / labels:.1f} %" if labels else "-"


def _span(values: Iterable[Any], style: str) -> str:
    values = sorted(values)
    if not values:
        return "-"
    low, high = format(values[0], style), format(values[-1], style)
    return low if low == high else f"{low} to {high}"


def _note_facts(facts: dict[str, Counter[str]], trajectory: Trajectory) -> None:
    sampling = trajectory.config["sampling"]
    text = f"{sampling['weights']} weights a layer, {sampling['snapshots']} snapshots, seed {sampling['seed']}"
    facts["sampled"][text] += 1
    for name, value in trajectory.provenance.items():
        for part, content in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(content, str | int | float):
                facts[_clean(f"{name} {part}".strip())][_clean(str(content))] += 1


def _fact_lines(facts: dict[str, Counter[str]]) -> list[str]:
    """One line a fact, with the number of runs for each value where they differ."""
    lines = []
    for name, counts in facts.items():
        shown = ", ".join(f"{value} ({count} runs)" for value, count in counts.most_common(_MOST_VALUES))
        if len(counts) == 1:
            shown = next(iter(counts))
        elif len(counts) > _MOST_VALUES:
            shown = f"{len(counts)} different values, from {min(counts)} to {max(counts)}"
        lines.append(f"{name}: {shown}")
    return lines


def _clean(text: str) -> str:
    """Text out of a file, fit for a terminal: no control characters, up to 60 characters."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= 60 else shown[:57] + "..."

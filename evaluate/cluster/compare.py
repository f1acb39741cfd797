"""Whether what a cluster made equals what one machine made, but for times and the names of machines."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from predictor.shared.files import read_json_lines

_MEASURED = ("seconds", "versions", "hardware", "started", "step_cost", "peak_memory", "slots", "provenance")
"""Words in the names of what is measured, and of what the machine is."""


def trajectories_differ(one: Path, other: Path) -> str:
    """Where two packed files differ; empty if they do not."""
    with open_trajectories(one) as first, open_trajectories(other) as second:
        if list(first.run_ids) != list(second.run_ids):
            return f"{len(first.run_ids)} runs and {len(second.run_ids)}, or others"
        for run_id in first.run_ids:
            ours, theirs = first.read(run_id), second.read(run_id)
            odd = [name for name in vars(ours) if _without(ours, name) != _without(theirs, name)]
            if odd:
                return f"run {run_id}: {', '.join(odd)}"
    return ""


def results_differ(one: Path, other: Path) -> str:
    """Where two files of results differ, in any order of their lines; empty if they do not."""
    rows = [[row for row in read_json_lines(path) if row.get("status") != "failed"] for path in (one, other)]
    for found in rows:
        twice = [name for name, times in Counter(row["trial_id"] for row in found).items() if times > 1]
        if twice:
            return f"trial {twice[0]} is there twice"
    first, second = ({row["trial_id"]: _plain(row) for row in found} for found in rows)
    if set(first) != set(second):
        return f"{len(first)} trials and {len(second)}, or others"
    for name, row in first.items():
        odd = [key for key in row if json.dumps(row[key]) != json.dumps(second[name].get(key))]
        if odd:
            return f"trial {name}: {', '.join(odd)}"
    return ""


def outcomes_differ(one: Path, other: Path) -> str:
    """Where two files of outcomes differ; empty if they do not."""
    first, second = ([_plain(row) for row in read_json_lines(path)] for path in (one, other))
    if len(first) != len(second) or not first:
        return f"{len(first)} outcomes and {len(second)}"
    odd = [number for number, rows in enumerate(zip(first, second, strict=True), start=1) if rows[0] != rows[1]]
    return f"lines {odd}" if odd else ""


def _without(trajectory: Trajectory, name: str) -> Any:
    """A field of a trajectory without times, as something to compare."""
    value = getattr(trajectory, name)
    if any(word in name for word in _MEASURED):
        return None
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in sorted(value.items()) if not any(word in key for word in _MEASURED)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value

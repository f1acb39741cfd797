"""Takes trials over that were run elsewhere: those that the repository publishes, or another machine's."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluate.trials.config import trial_id
from evaluate.trials.folder import PUBLISHED, SuiteFolder
from evaluate.trials.plan import Plan
from evaluate.trials.records import ADOPTED, MALFORMED, Results, Suite, has_result, trial_of
from evaluate.trials.suite import read_suite
from predictor.errors import FileFault
from predictor.shared.files import lines_of, read_json_lines


def published_results(suite: str) -> Results:
    """The published trials of a suite of `evaluate/suites`, to be compared by FLOPs. Raises FileFault without them."""
    plan = read_suite(suite)
    workloads, policies = (tuple(entry.label for entry in entries) for entries in (plan.workloads, plan.policies))
    groups = {entry.label: entry.group for entry in plan.workloads if entry.group}
    description = Suite(
        plan.name,
        plan.baseline,
        plan.margin,
        "flops",
        workloads,
        policies,
        plan.seeds,
        groups=groups,
        workload_seeds=plan.workload_seeds,
        policy_seeds=plan.policy_seeds,
    )
    read = (trial_of(row) for row in _rows(PUBLISHED / f"{plan.name}.jsonl.gz"))
    planned = [trial for trial in read if trial.workload in workloads and trial.policy in policies]
    trials = {
        (trial.workload, trial.policy, trial.seed): trial
        for trial in planned
        if trial.seed in description.seeds_of(trial.workload, trial.policy)
    }
    return Results(description, tuple(trials.values()), ())


def adopt(path: Path, plan: Plan, folder: SuiteFolder) -> list[dict[str, Any]]:
    """The results in `path` that the plan asks for and that `folder` has not, marked as taken over; writes nothing.

    Results are matched by the id of their configuration. So a trial is taken only if it is exactly the plan's, was
    trained on the same kind of device, and its costs were counted as they are now.

    path: a results.jsonl, or one packed by gzip.

    Raises FileFault where the file cannot be read.
    """
    own = [*read_json_lines(folder.results), *read_json_lines(folder.earlier)]
    wanted = {job.id for job in plan.jobs} - {row.get("trial_id") for row in own if has_result(row)}
    taken = {row["trial_id"]: row for row in _rows(path) if has_result(row) and _is_one_of(row, wanted)}
    return [{**row, ADOPTED: True} for row in taken.values()]


def _is_one_of(row: dict[str, Any], wanted: set[str]) -> bool:
    """Whether a line from elsewhere is a trial of a wanted configuration, as its id claims."""
    try:
        trial, config = trial_of(row), row["config"]
        expected = config["label"], config["policy"]["label"], config["seed"]
        return trial.trial_id == trial_id(config) in wanted and (trial.workload, trial.policy, trial.seed) == expected
    except MALFORMED:
        return False


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The file's objects, one at a time; lines that are none are passed over."""
    try:
        for line in lines_of(path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
    except (OSError, EOFError, zlib.error) as error:
        raise FileFault(f"{path}: cannot be read ({error}): give a results.jsonl, or one packed by gzip") from error

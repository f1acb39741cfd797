"""Runs the trials of a plan that have no result yet, and keeps each result the moment it is there."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from collect.jobs import Job, run_jobs
from evaluate.trials.folder import SuiteFolder
from evaluate.trials.plan import Plan
from evaluate.trials.records import ADOPTED, has_result
from predictor.errors import FileFault
from predictor.model.file import fingerprint
from predictor.shared.files import append_json_line, held, read_json_lines, write_json, written_whole

_FIGURES = ("workload", "policy", "seed", "status", "accuracy", "train_seconds", "cpu_seconds", "flops")


@dataclass(frozen=True)
class Summary:
    """The result of running a suite."""

    done: int
    """Trials with a result, those of earlier calls and diverged ones too."""
    failed: dict[str, str]
    """Why a trial has none and where its log is, by the trial's title."""


def pending(plan: Plan, folder: SuiteFolder, adopted: Sequence[dict[str, Any]] = ()) -> list[Job]:
    """The trials that have no result yet, also not among the adopted ones; one that failed has none."""
    rows = [*read_json_lines(folder.results), *read_json_lines(folder.earlier), *adopted]
    done = {row.get("trial_id") for row in rows if has_result(row)}
    return [job for job in plan.jobs if job.id not in done]


def run_suite(
    plan: Plan,
    folder: SuiteFolder,
    log: Callable[[dict[str, Any], int], None],
    adopted: Sequence[dict[str, Any]] = (),
) -> Summary:
    """Run what is pending. Killed at any time, the same call goes on with the trials that were not finished.

    Args:
        plan: The suite's trials.
        folder: Where its results are kept.
        log: Called with the figures of each trial that ends, and how many have a result by then.
        adopted: Results from elsewhere (`evaluate.trials.adopt.adopt`), which the folder keeps from now on.

    Raises:
        FileFault: The folder cannot be written to.
        UsageError: Another process is at work in it.
    """
    with held(folder.lock, "another run-suite"):
        for row in adopted:
            append_json_line(folder.earlier, row)
        left = pending(plan, folder)
        _sort_results(plan, folder)
        write_json(folder.suite, _description(plan, folder, left))
        _copy_predictors(plan, folder)
        return _run(left, plan, folder, log)


def _run(left: list[Job], plan: Plan, folder: SuiteFolder, log: Callable[[dict[str, Any], int], None]) -> Summary:
    done = len(plan.jobs) - len(left)
    failed: dict[str, str] = {}
    rows = {trial.id: trial.row for trial in plan.trials}

    def keep(job: Job, result: dict[str, Any]) -> None:
        nonlocal done
        append_json_line(folder.results, result)
        done += 1
        log({name: result[name] for name in _FIGURES}, done)

    def report(job: Job, error: str) -> None:
        append_json_line(folder.results, {**rows[job.id], "status": "failed", "error": error})
        failed[job.title] = f"{error}; its log: {folder.log(job.id)}"

    settings = plan.settings
    run_jobs(
        left,
        folder=folder.root,
        slots=settings.chosen_slots,
        log=folder.log,
        on_done=keep,
        on_failed=report,
        device=settings.device,
        options=settings.jobs,
    )
    return Summary(done, failed)


def _sort_results(plan: Plan, folder: SuiteFolder) -> None:
    """Leave in results.jsonl what the plan asks for. The rest goes to earlier.jsonl, from where it can come back."""
    wanted = {job.id for job in plan.jobs}
    rows, earlier = read_json_lines(folder.results), read_json_lines(folder.earlier)

    def stays(row: dict[str, Any]) -> bool:
        # What was counted otherwise is run again, and must not stand beside what is counted as now until then.
        return (has_result(row) or _failed(row)) and row["trial_id"] in wanted

    for row in rows:
        if not stays(row) and row not in earlier:
            append_json_line(folder.earlier, row)
    stay = [row for row in rows if stays(row)]
    have = {row["trial_id"] for row in stay if has_result(row)}
    back = {row["trial_id"]: row for row in earlier if has_result(row) and row["trial_id"] in wanted - have}
    stay += back.values()
    with written_whole(folder.results) as part:
        part.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in stay), encoding="utf-8")


def _failed(row: dict[str, Any]) -> bool:
    return row.get("status") == "failed" and isinstance(row.get("trial_id"), str)


def _description(plan: Plan, folder: SuiteFolder, left: list[Job]) -> dict[str, Any]:
    """What the report needs to know of the suite."""
    suite, rows = plan.suite, [row for row in read_json_lines(folder.results) if has_result(row)]
    sharing = {row["slots"] for row in rows} | ({plan.settings.sharing} if left else set())
    seconds = "train_seconds" if sharing <= {1} else "cpu_seconds"
    elsewhere = any(row.get(ADOPTED) for row in rows) or not plan.settings.jobs.one_machine
    on_gpu = plan.settings.device_type != "cpu"
    return {
        "name": suite.name,
        "baseline": suite.baseline,
        "margin": suite.margin,
        # Seconds of one machine say nothing of another's, nor a process's of a GPU that several share.
        "cost": "flops" if elsewhere or (on_gpu and seconds == "cpu_seconds") else seconds,
        "workloads": [entry.label for entry in suite.workloads],
        "groups": {entry.label: entry.group for entry in suite.workloads if entry.group},
        "policies": [entry.label for entry in suite.policies],
        "seeds": list(suite.seeds),
        "workload_seeds": suite.workload_seeds,
        "policy_seeds": suite.policy_seeds,
    }


def _copy_predictors(plan: Plan, folder: SuiteFolder) -> None:
    for mark, path in plan.predictors.items():
        copy = folder.predictor(mark)
        with written_whole(copy) as part:
            part.write_bytes(path.read_bytes())
        if fingerprint(copy) != mark:
            raise FileFault(f"{path}: changed while it was read; run the same command again")

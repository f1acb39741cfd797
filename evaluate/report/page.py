"""From a suite's results to one self-contained HTML page, readable in light and dark, on a phone, without a network."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from evaluate.analysis.area import LOSS, area_headline, areas
from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers, curve_lengths, full_training_lengths
from evaluate.analysis.families import MANY, colour_indices, families, policy_names, rival
from evaluate.analysis.oracle_file import Oracle, find_oracles, oracles_beside, shares_of_saving
from evaluate.analysis.statistics import (
    AS_ACCURATE,
    BASELINE,
    CANNOT_TELL,
    LESS_ACCURATE,
    Row,
    compare,
    overall,
)
from evaluate.report import format as write
from evaluate.report import over_time, tradeoff
from evaluate.report.cards import cards
from evaluate.report.curves import curve_plots
from evaluate.report.findings import findings, headline
from evaluate.report.full_training import full_training_plot
from evaluate.report.protocol import protocol
from evaluate.report.svg import Plot, swatch
from evaluate.trials.records import COST_AXES, Results, Trial, read_results
from predictor.shared.files import written_whole

_HERE = Path(__file__).parent
_SYMBOLS = {AS_ACCURATE: "✓", LESS_ACCURATE: "▼", CANNOT_TELL: "?", BASELINE: ""}


def make_report(folder: Path, oracles: Path | None = None, cost: str | None = None, against: str = "") -> Path:
    """Read `folder`/suite.json and results.jsonl and write `folder`/report.html, whole or not at all.

    Args:
        folder: What `python -m evaluate run-suite` wrote.
        oracles: The folder of the files that `python -m evaluate oracle` wrote. They need not be there, and one that
            does not fit is named in the page. Default: `oracle` beside `folder`.
        cost: The measure to compare by, a key of COST_AXES. Default: the suite's own.
        against: The family whose area and curve the others are compared with. Default: training for fewer steps.

    Raises:
        FileFault: The results cannot be read or the page cannot be written.
        UsageError: There is no such family.
    """
    results = read_results(folder, cost, against)
    page = render(results, *find_oracles(oracles or oracles_beside(folder), results))
    path = folder / "report.html"
    with written_whole(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    return path


def render(results: Results, oracles: Mapping[str, Oracle] | None = None, refused: Sequence[str] = ()) -> str:
    """The page as text: every string of the results is escaped, and the page forbids any other script and address.

    oracles: by workload. refused: why others were not used.
    """
    rows, found, multipliers = compare(results), areas(results), compute_multipliers(results)
    other = rival([row.family for row in found], results.suite.against)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        suite=results.suite,
        headline=headline(results, rows),
        findings=findings(results),
        cost_axis=COST_AXES[results.suite.cost],
        protocol=protocol(results),
        groups=_grouped(results, rows),
        overall=_grouped(results, overall(rows)),
        policies=results.policies,
        crowded=len(results.policies) > MANY,
        areas=found,
        area_headline=area_headline(found, other, len(results.workloads)),
        area_loss=LOSS,
        rival=other,
        curves=curve_plots(results, rows, found),
        multipliers=multipliers,
        lengths=full_training_lengths(results),
        on_the_curve=curve_lengths(results),
        curve_gaps=write.curve_gaps(results),
        oracle_notes=[write.oracle_note(oracle, results) for oracle in (oracles or {}).values()],
        oracle_shares=shares_of_saving(results, rows, oracles or {}),
        cards=cards(policy_names(results)),
        main_plots=_drawn([full_training_plot(results, multipliers, None), tradeoff.overall_plot(results, rows)]),
        workloads=_workloads(results, rows, multipliers),
        swatches={policy: swatch(index) for policy, index in colour_indices(results).items()},
        legend=_legend(results),
        symbols=_SYMBOLS,
        trials=results.trials,
        seeds=results.seed_count,
        counts={status: _of_status(results, status) for status in ("finished", "diverged", "failed")},
        missing=results.missing(),
        missing_seeds=_missing_seeds(results),
        caches=_caches(results),
        faults=results.faults,
        refused=refused,
        configurations=[
            (name, distinct(_recipe(t) for t in results.trials if t.workload == name)) for name in results.workloads
        ],
        versions=distinct(trial.versions for trial in results.trials),
        hardware=distinct(trial.hardware for trial in results.trials),
        write=write,
    )


def distinct(mappings: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """For each key, its different values as text with how many of the mappings hold them; nested keys are dotted."""
    counts: dict[str, dict[str, int]] = {}
    for mapping in mappings:
        for key, value in _flat(mapping):
            values = counts.setdefault(key, {})
            values[value] = values.get(value, 0) + 1
    return [(key, list(values.items())) for key, values in counts.items()]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _recipe(trial: Trial) -> Mapping[str, Any]:
    """A trial's configuration without what the tables already show."""
    said = ("workload", "seed", "policy", "policy_name", "policy_options")
    return {key: value for key, value in trial.config.items() if key not in said}


def _grouped(results: Results, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows, workload by workload and in each family by family, the baseline first."""
    order = [(results.suite.baseline,), *(family.members for family in families(results))]
    workloads = dict.fromkeys(row.workload for row in rows)
    cells = [(name, own) for name in workloads for own in order]
    groups = ([row for row in rows if row.workload == name and row.policy in own] for name, own in cells)
    return [group for group in groups if group]


def _legend(results: Results) -> list[tuple[str, str]]:
    """The baseline and each family, with the swatch that stands for it."""
    names = [results.suite.baseline, *(family.name for family in families(results))]
    return [(name, swatch(index)) for index, name in enumerate(names)]


def _missing_seeds(results: Results) -> list[tuple[str, str, str]]:
    """Workload, policy and the seeds of the trials that were not run."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for workload, policy, seed in results.missing():
        seeds.setdefault((workload, policy), []).append(str(seed))
    return [(workload, policy, ", ".join(found)) for (workload, policy), found in seeds.items()]


def _caches(results: Results) -> list[tuple[str, float]]:
    """The policies that had a cache, each with the share of batches for which it skipped the frozen prefix."""
    shares = {name: [t.hit_share for t in results.trials if t.policy == name] for name in results.policies}
    known = {name: [share for share in found if share is not None] for name, found in shares.items()}
    return [(name, fmean(found)) for name, found in known.items() if found]


def _of_status(results: Results, status: str) -> list[Trial]:
    return [trial for trial in results.trials if trial.status == status]


def _workloads(
    results: Results, rows: Sequence[Row], multipliers: Mapping[tuple[str | None, str], Multiplier]
) -> list[dict[str, Any]]:
    """Each workload's name, its plots, and the policies that froze nothing on it."""
    sections = []
    for name in tqdm(results.workloads, desc="report", unit="workload", disable=None, delay=3):
        timelines, idle = over_time.timeline_plots(results, name)
        plots = _drawn(
            [
                full_training_plot(results, multipliers, name),
                tradeoff.workload_plot(results, rows, name),
                over_time.loss_plot(results, name),
                over_time.step_cost_plot(results, name),
            ]
        )
        sections.append({"name": name, "plots": plots, "timelines": timelines, "idle": idle})
    return sections


def _drawn(plots: Sequence[Plot | None]) -> list[Plot]:
    """Those of the figures that had anything to draw."""
    return [plot for plot in plots if plot]

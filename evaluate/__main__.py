"""What freezing saves and what it costs: `python -m evaluate run-suite`, then `report`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from collect.jobs import add_job_options, job_options
from evaluate.trials.folder import PUBLISHED
from predictor.errors import UsageError
from predictor.shared import flags as cli
from predictor.shared.tracking import add_wandb_flag, start_tracker

if TYPE_CHECKING:
    from evaluate.trials.plan import Plan

_RUNS = Path("runs/evaluate")
_COSTS = {"wall": "train_seconds", "cpu": "cpu_seconds", "flops": "flops"}
"""What `--cost` takes, and the measure in `evaluate.trials.records.COST_AXES` that it stands for."""
_HALF_A_POINT = 0.005
"""What a schedule that `oracle` names as the best may lose of the accuracy, a share of 1: half a percentage point."""


def main(argv: Sequence[str] | None = None) -> int | None:
    flags = _parser().parse_args(argv)
    status: int | None = flags.run(flags)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    _add_run_suite(command("run-suite", _run_suite, "train workloads afresh under every policy, then report"))
    report = command("report", _report, "the table and the page of a suite that was run")
    report.add_argument("folder", nargs="?", type=Path, default=_RUNS / "quick", help="default: %(default)s")
    text = "folder of what `oracle` found, to compare with (default: `oracle` beside the suite's folder)"
    report.add_argument("--oracles", type=Path, help=text)
    text = "compare by wall-clock time, CPU time or FLOPs (default: as the suite was run)"
    report.add_argument("--cost", choices=_COSTS, help=text)
    text = "policies whose area the others' are compared with, as the table calls them (default: fewer steps)"
    report.add_argument("--against", default="", metavar="FAMILY", help=text)
    text = "print the policies' curves as a table in Markdown, and nothing else"
    report.add_argument("--markdown", action="store_true", help=text)
    _add_oracle(command("oracle", _oracle, "search the best freezing schedule of one workload"))
    bench = command("bench", _bench, "what recording, deciding and frozen layers cost, against the limits")
    bench.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="default: %(default)s")
    _add_device(bench)
    _add_gpu(command("gpu", _gpu, "check on a GPU all that may be otherwise there, in at most 10 minutes"))
    text = "check on three Ray nodes of this machine that a cluster makes what one machine makes; needs root"
    _add_cluster_check(command("cluster-check", _cluster_check, text))
    command("published", _published, "what the published trials show, as Markdown, and the README's picture")
    return parser


def _add_run_suite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", default="quick", help="a name of evaluate/suites, or a TOML file (default: %(default)s)"
    )
    parser.add_argument(
        "--slots", type=int, help="trials at once; with 1, costs are wall-clock times (default: one a CPU core or GPU)"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: {_RUNS}/SUITE)")
    parser.add_argument(
        "--predictor",
        type=Path,
        help="predictor file (default: what the suite names, else runs/predictor.safetensors, else what ships)",
    )
    parser.add_argument(
        "--adopt",
        type=Path,
        nargs="?",
        const=PUBLISHED,
        metavar="FILE",
        help="take over trials that were run elsewhere, a results.jsonl or results.jsonl.gz, and run the others alone; "
        "without FILE those that this repository publishes. Costs are then FLOPs",
    )
    _add_device(parser)
    add_wandb_flag(parser)
    parser.add_argument("--dry-run", action="store_true", help="list the trials, train nothing")
    add_job_options(parser)


def _add_oracle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", help="its name; with --suite, what the suite calls it")
    parser.add_argument("--suite", help="take recipe, source and seeds from this suite, to compare with its policies")
    parser.add_argument("--trials", type=int, default=60, help="schedules to try (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="trainings of each schedule (default: all those of the suite, or 0 1 2)"
    )
    parser.add_argument("--slots", type=int, help="trainings at once (default: one a CPU core or GPU)")
    parser.add_argument("--out", type=Path, default=_RUNS / "oracle", help="default: %(default)s")
    _add_device(parser)
    add_job_options(parser)


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    from evaluate.gpu.checks import CHECKS

    text = f"checks to run, of: {', '.join(CHECKS)} (default: all)"
    parser.add_argument("--only", nargs="+", default=(), metavar="CHECK", help=text)
    text = "minutes for all checks together (default: %(default)g)"
    parser.add_argument("--minutes", type=float, default=10.0, help=text)
    text = "the table as Markdown (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.md"), metavar="FILE", help=text)
    text = "auto, cpu, cuda or cuda:1 (default: %(default)s; without CUDA: what a CPU can show, small)"
    parser.add_argument("--device", default="auto", help=text)


def _add_cluster_check(parser: argparse.ArgumentParser) -> None:
    text = "checks to run, of: token, full-disk, outcomes, gather, quick, overhead, scale (default: the first five)"
    parser.add_argument("--only", nargs="+", default=(), metavar="CHECK", help=text)
    text = "nodes, processes and drivers that are killed, over all checks (default: %(default)s)"
    parser.add_argument("--kills", type=int, default=50, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (default: %(default)s)")
    text = "where all files go; those of the last time are removed (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("runs/cluster"), metavar="FOLDER", help=text)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")


def _run_suite(flags: argparse.Namespace) -> int:
    from evaluate.trials.adopt import adopt
    from evaluate.trials.folder import SuiteFolder
    from evaluate.trials.plan import Settings, make_plan
    from evaluate.trials.run import pending, run_suite
    from evaluate.trials.suite import read_suite

    suite = read_suite(flags.suite)
    folder = SuiteFolder(flags.out or _RUNS / suite.name)
    plan = make_plan(suite, Settings(flags.device, flags.slots, flags.predictor, job_options(flags)))
    adopted = []
    if flags.adopt is not None:
        # All that is published: a user's suite may take trials of several, and has a name of its own.
        paths = sorted(PUBLISHED.glob("*.jsonl.gz")) if flags.adopt == PUBLISHED else [flags.adopt]
        # Published suites share trials.
        adopted = list({row["trial_id"]: row for path in paths for row in adopt(path, plan, folder)}.values())
        print(f"adopted: {len(adopted)} trials of {flags.adopt}")
    left = pending(plan, folder, adopted)
    _introduce(plan, len(left), folder.root, bool(adopted))
    if flags.dry_run:
        waiting = {job.id for job in left}
        for job in plan.jobs:
            print(f"{'to run' if job.id in waiting else 'done  '}  {job.id}  {job.title}")
        return 0
    config = {"suite": suite.name, "trials": len(plan.jobs), "slots": plan.settings.chosen_slots}
    with start_tracker("evaluate", flags.wandb, folder.root, config) as tracker:
        summary = run_suite(plan, folder, tracker.log, adopted)
    _show(folder.root)
    for title, why in summary.failed.items():
        print(f"FAILED {title}: {why}")
    if summary.failed:
        print("The same command tries these again.")
    return 1 if summary.failed else 0


def _introduce(plan: "Plan", left: int, root: Path, adopted: bool) -> None:
    """Say what is going to happen, and what the costs will be."""
    from collect.training.device import pick_device
    from evaluate.trials.plan import TRAINED

    suite, settings = plan.suite, plan.settings
    own = ", some have others" if suite.workload_seeds or suite.policy_seeds else ""
    grid = f"workloads: {len(suite.workloads)}, policies: {len(suite.policies)}, seeds: {len(suite.seeds)}{own}"
    print(f"suite {suite.name}: {len(plan.jobs)} trials ({grid}); {left} to run, {settings.at_once}")
    for mark, path in plan.predictors.items():
        print(f"predictor: {path} (sha256 {mark})")
    if plan.predictors and not (settings.predictor or suite.shipped or TRAINED.exists()):
        print(f"there is no {TRAINED} yet: policies that name no predictor use the one that ships")
    if adopted:
        print("cost: FLOPs; the seconds of trials that were run elsewhere are not compared")
    elif not settings.jobs.one_machine:
        print("cost: FLOPs; the seconds of a cluster's machines are not compared")
    elif settings.sharing == 1:
        print("cost: wall-clock time; one trial runs at a time")
    elif pick_device(settings.device).type == "cpu":
        print(f"cost: CPU time and FLOPs; {settings.sharing} trials share the machine (--slots 1 for wall-clock time)")
    else:
        print(f"cost: FLOPs alone, for {settings.sharing} trials share a GPU (no more --slots than GPUs for seconds)")
    print(f"results: {root}", flush=True)


def _report(flags: argparse.Namespace) -> None:
    if flags.oracles is not None and not flags.oracles.is_dir():
        raise UsageError(f"--oracles {flags.oracles}: there is no such folder: give one that `oracle` wrote into")
    cost = None if flags.cost is None else _COSTS[flags.cost]
    if flags.markdown:
        _print_markdown(flags.folder, flags.oracles, cost, flags.against)
    else:
        _show(flags.folder, flags.oracles, cost, flags.against)


def _print_markdown(folder: Path, oracles: Path | None, cost: str | None, against: str) -> None:
    from evaluate.analysis.oracle_file import find_oracles, oracles_beside
    from evaluate.report.markdown import markdown
    from evaluate.trials.records import read_results

    results = read_results(folder, cost, against)
    print(markdown(results, find_oracles(oracles or oracles_beside(folder), results)[0]))
    if missing := len(results.missing()) + len(results.faults):
        print(f"{missing} trials are missing: {folder} is not complete", file=sys.stderr)


def _oracle(flags: argparse.Namespace) -> None:
    from evaluate.analysis.oracle import find_oracle, make_search, written
    from evaluate.analysis.oracle_file import read_oracle
    from evaluate.report.format import oracle_finding
    from evaluate.trials.plan import Settings

    search = make_search(flags.workload, flags.suite, flags.seeds, flags.trials)
    print(f"oracle of {flags.workload}: {search.trials} schedules, seeds {list(search.seeds)}", flush=True)
    path = find_oracle(search, flags.out, Settings(flags.device, flags.slots, jobs=job_options(flags)))
    oracle = read_oracle(path)
    print(f"\n{written(oracle.front)}\n")
    print(f"{oracle_finding(oracle, _HALF_A_POINT)}.")
    print(f"The best of {oracle.tried} on the test set: part of it is luck, and what was not tried may be better.")
    print("`python -m evaluate report` on a suite's results says its compute multiplier against full training's curve.")
    print(path.resolve())


def _show(folder: Path, oracles: Path | None = None, cost: str | None = None, against: str = "") -> None:
    from evaluate.report.page import make_report
    from evaluate.report.table import print_table

    print()
    print_table(folder, oracles, cost, against)
    print(f"\nreport: {make_report(folder, oracles, cost, against).resolve()}")


def _published(flags: argparse.Namespace) -> None:
    from evaluate.report.published import PICTURE, publish

    print(publish())
    print(f"picture: {PICTURE}", file=sys.stderr)


def _bench(flags: argparse.Namespace) -> int:
    from evaluate.bench.bench import run_bench

    return 0 if run_bench(flags.out, flags.device) else 1


def _cluster_check(flags: argparse.Namespace) -> int:
    from evaluate.cluster.command import Settings, run_checks

    return run_checks(Settings(tuple(flags.only), flags.kills, flags.seed, flags.out))


def _gpu(flags: argparse.Namespace) -> int:
    from evaluate.gpu.command import Settings, run_checks

    try:
        return run_checks(Settings(flags.device, tuple(flags.only), flags.minutes, flags.out))
    except KeyboardInterrupt:  # the table so far is written, and the same command would start over
        return 130


if __name__ == "__main__":
    cli.run(main)

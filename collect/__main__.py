"""Trains networks: records how layers move, or what freezing does (gather); makes the weights that ship (pretrain)."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from collect.gather.continuation_plan import Choices
from collect.jobs import add_job_options, job_options
from predictor.shared import flags as cli
from predictor.shared.tracking import add_wandb_flag

if TYPE_CHECKING:
    from collect.gather.gathering import Kind
    from collect.gather.plan import Suite

_TRAJECTORIES = (
    "Trains the runs of a suite and records them in FOLDER/trajectories.h5. After Ctrl-C or a power cut, the same "
    "command resumes; finished runs are not trained again."
)
_OUTCOMES = (
    "Trains each run of a suite in full, and from several moments on again: with a prefix of the layers or a single "
    "layer frozen to the end, and with nothing frozen and the samples in another order, which shows how much is "
    "chance. The final losses are in FOLDER/outcomes.jsonl, a line a training, under the run's id in trajectories.h5; "
    "`python -m data outcomes` summarizes them. After an interruption the same command resumes."
)
_PRETRAIN = (
    "Trains the workloads whose names end in -first, some minutes each on one thread of a CPU, and writes their "
    "weights as safetensors, by default to collect/workloads/weights, where the -transfer workloads look for them."
)


def main(argv: Sequence[str] | None = None) -> int | None:
    flags = _parser().parse_args(argv)
    status: int | None = flags.command(flags)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m collect", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "train the runs of a suite and record them, or what freezing does to them"
    gather = commands.add_parser("gather", help=text, description=text)
    kinds = gather.add_subparsers(title="what to gather", required=True, metavar="WHAT")
    text = "how the layers of the runs move, for `python -m predictor train`"
    _add_settings(kinds.add_parser("trajectories", help=text, description=_TRAJECTORIES), "trajectories", _trajectories)
    text = "the final loss of the runs with layers frozen from several moments on"
    outcomes = kinds.add_parser("outcomes", help=text, description=_OUTCOMES)
    _add_settings(outcomes, "outcomes", _outcomes)
    _add_choices(outcomes)
    text = "train the networks that the -transfer workloads start from, and write their weights"
    pretrain = commands.add_parser("pretrain", help=text, description=_PRETRAIN)
    text = "networks, such as vgg: the beginnings of their workloads' names (default: all)"
    pretrain.add_argument("names", nargs="*", metavar="NAME", help=text)
    text = "where the files go (default: the folder of those that ship)"
    pretrain.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    _add_device(pretrain)
    pretrain.set_defaults(command=_pretrain)
    return parser


def _add_settings(
    parser: argparse.ArgumentParser, suite: str, kind: "Callable[[argparse.Namespace, Suite], Kind]"
) -> None:
    parser.set_defaults(command=_gather, kind=kind)
    add = parser.add_argument
    text = "a name in collect/suites, or a TOML file of your own (default: %(default)s)"
    add("--suite", default=suite, metavar="NAME|PATH", help=text)
    add(
        "--slots",
        type=int,
        metavar="N",
        help="runs at once (default: one a CPU core; with GPUs up to 4 on each, one for every 16 GB)",
    )
    text = "the I-th of N parts of the suite, for job arrays"
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help=text)
    text = "where all files go (default: %(default)s)"
    add("--out", type=Path, default=Path("runs"), metavar="FOLDER", help=text)
    _add_device(parser)
    add("--dry-run", action="store_true", help="list the runs and their states, and do nothing")
    add_wandb_flag(parser)
    add_job_options(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    text = "auto, cpu, cuda, cuda:1, ... or mps (default: %(default)s: a GPU if any)"
    parser.add_argument("--device", default="auto", help=text)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "progress of a run, from 0 to below 1, to continue from (default: %(default)s)"
    add("--points", type=_numbers, default=_listed(Choices.points), metavar="A,B,...", help=text)
    text = "shares of the layers that are then frozen as a prefix (default: %(default)s)"
    add("--fronts", type=_numbers, default=_listed(Choices.prefixes), dest="prefixes", metavar="A,B,...", help=text)
    text = "layers that are each frozen alone, drawn by the run's seed (default: %(default)s)"
    add("--singles", type=int, default=Choices.singles, metavar="N", help=text)


def _gather(flags: argparse.Namespace) -> int:
    from collect.gather.gathering import describe_plan, gather
    from collect.gather.plan import read_suite
    from collect.gather.settings import Settings
    from predictor.shared.tracking import start_tracker

    suite, settings = read_suite(flags.suite), Settings(flags.device, flags.slots, flags.shard, job_options(flags))
    kind = flags.kind(flags, suite)
    if flags.dry_run:
        print(describe_plan(suite, kind, settings))
        return 0
    config = {"suite": suite.name, "runs": [run.id for run in suite.runs], "slots": settings.chosen_slots}
    with start_tracker("collect", flags.wandb, kind.files.root, {**config, **kind.config}) as tracker:
        gathered = gather(suite, kind, settings, tracker)
    if gathered.table:
        print(f"\n{gathered.table}")
    for title, error in gathered.failed.items():
        print(f"FAILED {title}: {error}")
    if gathered.failed:
        print(f"{len(gathered.failed)} runs failed: the same command tries them again")
    if gathered.packed is not None:
        print(f"{gathered.packed}\nnext: {kind.next_command}")
    elif not gathered.failed:
        print("runs of other shards are missing: the last shard to end packs them all")
    return 1 if gathered.failed else 0


def _trajectories(flags: argparse.Namespace, suite: "Suite") -> "Kind":
    from collect.gather.trajectories import Trajectories
    from data.trajectories.folder import GatherFolder

    return Trajectories(GatherFolder(flags.out / "trajectories"), suite.checkpoint_seconds)


def _outcomes(flags: argparse.Namespace, suite: "Suite") -> "Kind":
    from collect.gather.outcomes import Outcomes
    from data.outcomes.records import OutcomeFolder

    choices = Choices(flags.points, flags.prefixes, flags.singles)
    return Outcomes(OutcomeFolder(flags.out / "outcomes"), choices)


def _pretrain(flags: argparse.Namespace) -> None:
    from collect.pretrain import pretrain
    from collect.workloads.transfer import WEIGHTS

    pretrain(flags.out or WEIGHTS, flags.names, device=flags.device)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit()) or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: give i/n with i from 1 to n, such as 2/8")
    return int(number), int(count)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers with commas between them, such as 0,0.5") from None


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    cli.run(main)

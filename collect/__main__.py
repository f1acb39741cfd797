"""Trains networks: records how layers move, or what freezing does (gather); makes the weights that ship (pretrain)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from collect.gather.continuation_plan import Choices
from predictor.shared import flags as cli
from predictor.shared.tracking import add_wandb_flag

if TYPE_CHECKING:
    from collect.gather.trajectories import Settings


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
    trajectories = kinds.add_parser("trajectories", help=text, description=_TRAJECTORIES)
    _add_settings(trajectories, "trajectories")
    trajectories.set_defaults(command=_gather)
    text = "the final loss of the runs with layers frozen from several moments on"
    outcomes = kinds.add_parser("outcomes", help=text, description=_OUTCOMES)
    _add_settings(outcomes, "outcomes")
    _add_choices(outcomes)
    outcomes.set_defaults(command=_gather_outcomes)
    text = "train the networks that the -transfer workloads start from, and write their weights"
    pretrain = commands.add_parser("pretrain", help=text, description=_PRETRAIN)
    text = "which networks, such as vgg, by what their workloads' names begin with (default: all)"
    pretrain.add_argument("names", nargs="*", metavar="NAME", help=text)
    text = "where the files go (default: where those that ship are)"
    pretrain.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    _add_device(pretrain)
    pretrain.set_defaults(command=_pretrain)
    return parser


def _add_settings(parser: argparse.ArgumentParser, suite: str) -> None:
    parser.add_argument(
        "--suite",
        default=suite,
        metavar="NAME|PATH",
        help="a name in collect/suites, or a TOML file of your own (default: %(default)s)",
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="runs at once (default: one a GPU, or one a CPU core without a GPU)"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the suite, for job arrays"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where all files go (default: %(default)s)"
    )
    _add_device(parser)
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what became of them, do nothing")
    add_wandb_flag(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps (default: %(default)s: a GPU if any)"
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    text = "progress of a run, from 0 to below 1, from which it goes on again (default: %(default)s)"
    parser.add_argument("--points", type=_numbers, default=_listed(Choices.points), metavar="A,B,...", help=text)
    text = "shares of the layers that are then frozen, from the input on (default: %(default)s)"
    parser.add_argument("--fronts", type=_numbers, default=_listed(Choices.fronts), metavar="A,B,...", help=text)
    text = "layers that are each frozen alone, drawn by the run's seed (default: %(default)s)"
    parser.add_argument("--singles", type=int, default=Choices.singles, metavar="N", help=text)


_TRAJECTORIES = (
    "Trains the runs of a suite and records them in FOLDER/trajectories.h5. Broken off, by Ctrl-C or by a power cut, "
    "the same command goes on; runs that are there already are not trained again."
)

_OUTCOMES = (
    "Trains each run of a suite in full, and from several moments on again: with a front or a single layer frozen to "
    "the end, and with nothing frozen and the samples in another order, which shows how much is chance. The final "
    "losses are in FOLDER/outcomes.jsonl, a line a training, under the run's id in trajectories.h5; "
    "`python -m data outcomes` sums them up. Broken off, the same command goes on; what is there already is not "
    "trained again."
)

_PRETRAIN = (
    "Trains the workloads whose names end in -first, some minutes each on one thread of a CPU, and writes their "
    "weights as safetensors, by default to collect/workloads/weights, where the -transfer workloads look for them."
)


def _gather(flags: argparse.Namespace) -> int:
    from collect.gather.plan import read_suite
    from collect.gather.trajectories import describe_plan, gather, summary_table
    from data.trajectories.folder import GatherFolder
    from predictor.shared.tracking import start_tracker

    suite, files = read_suite(flags.suite), GatherFolder(flags.out / "trajectories")
    settings = _settings(flags)
    if flags.dry_run:
        print(describe_plan(suite, files, settings))
        return 0
    config = {"suite": suite.name, "runs": [run.id for run in suite.runs], "slots": settings.chosen_slots}
    with start_tracker("collect", flags.wandb, files.root, config) as tracker:
        gathered = gather(suite, files, settings, tracker)
    if gathered.trajectories:
        print(f"\n{summary_table(files, gathered.trajectories)}")
    packed = None if gathered.packed is None else f"{gathered.packed}\nnext: python -m predictor train"
    return _end(gathered.failed, packed)


def _gather_outcomes(flags: argparse.Namespace) -> int:
    from collect.gather.outcomes import describe_plan, gather_outcomes
    from collect.gather.plan import read_suite
    from data.outcomes.records import OutcomeFolder
    from predictor.shared.tracking import start_tracker

    suite, files = read_suite(flags.suite), OutcomeFolder(flags.out / "outcomes")
    settings, choices = _settings(flags), Choices(flags.points, flags.fronts, flags.singles)
    if flags.dry_run:
        print(describe_plan(suite, files, settings, choices))
        return 0
    config = {"suite": suite.name, "runs": [run.id for run in suite.runs], **choices.as_dict()}
    with start_tracker("collect", flags.wandb, files.root, config) as tracker:
        gathered = gather_outcomes(suite, files, settings, choices, tracker)
    packed = None
    if gathered.packed is not None:
        packed = f"{gathered.packed}\nnext: python -m data outcomes {gathered.packed} --trajectories FILE"
    return _end(gathered.failed, packed)


def _settings(flags: argparse.Namespace) -> "Settings":
    from collect.gather.trajectories import Settings

    return Settings(flags.device, flags.slots, flags.shard)


def _end(failed: dict[str, str], packed: str | None) -> int:
    """Say what failed and what there is. Returns the exit status."""
    for title, error in failed.items():
        print(f"FAILED {title}: {error}")
    if failed:
        print(f"{len(failed)} runs failed: the same command tries them again")
    if packed is not None:
        print(packed)
    elif not failed:
        print("runs of other shards are missing: the last shard to end packs them all")
    return 1 if failed else 0


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

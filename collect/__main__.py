"""Trains networks: records how the layers of many move (gather), makes the weights that ship (pretrain)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from predictor import cli
from predictor.tracking import add_wandb_flag

_DEFAULT_SUITE = "trajectories"


def main(argv: Sequence[str] | None = None) -> int | None:
    flags = _parser().parse_args(argv)
    status: int | None = flags.command(flags)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m collect", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    gather = commands.add_parser("gather", help="train and record the runs of a suite", description=_GATHER)
    gather.add_argument("what", choices=["trajectories"], help="what to gather")
    gather.add_argument(
        "--suite",
        default=_DEFAULT_SUITE,
        metavar="NAME|PATH",
        help="a name in collect/suites, or a TOML file of your own (default: %(default)s)",
    )
    gather.add_argument(
        "--slots", type=int, metavar="N", help="runs at once (default: one a GPU, or one a CPU core without a GPU)"
    )
    gather.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the suite, for job arrays"
    )
    gather.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="FOLDER", help="where all files go (default: %(default)s)"
    )
    gather.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps (default: %(default)s: a GPU if any)"
    )
    gather.add_argument("--dry-run", action="store_true", help="list the runs and what became of them, do nothing")
    add_wandb_flag(gather)
    gather.set_defaults(command=_gather)
    text = "train the network that resnet20-transfer starts from, and write its weights"
    pretrain = commands.add_parser("pretrain", help=text, description=_PRETRAIN)
    pretrain.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: the one that ships)")
    pretrain.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... or mps (default: %(default)s: a GPU if any)"
    )
    pretrain.set_defaults(command=_pretrain)
    return parser


_GATHER = (
    "Trains the runs of a suite and records them in FOLDER/trajectories.h5. Broken off, by Ctrl-C or by a power cut, "
    "the same command goes on; runs that are there already are not trained again."
)

_PRETRAIN = (
    "Trains the workload resnet20-first, 3 minutes on one thread of a CPU, and writes its weights as safetensors, "
    "by default to collect/workloads/weights, where resnet20-transfer looks for them."
)


def _gather(flags: argparse.Namespace) -> int:
    from collect.gather import Settings, describe_plan, gather, summary_table
    from collect.grid import read_suite
    from data.trajectories.store import GatherFolder
    from predictor.tracking import start_tracker

    suite, files = read_suite(flags.suite), GatherFolder(flags.out / "trajectories")
    settings = Settings(flags.device, flags.slots, flags.shard)
    if flags.dry_run:
        print(describe_plan(suite, files, settings))
        return 0
    config = {"suite": suite.name, "runs": [run.id for run in suite.runs], "slots": settings.chosen_slots}
    with start_tracker("collect", flags.wandb, files.root, config) as tracker:
        gathered = gather(suite, files, settings, tracker)
    if gathered.trajectories:
        print(f"\n{summary_table(files, gathered.trajectories)}")
    for title, error in gathered.failed.items():
        print(f"FAILED {title}: {error}")
    if gathered.failed:
        print(f"{len(gathered.failed)} runs failed: the same command tries them again")
    if gathered.packed is not None:
        print(f"{gathered.packed}\nnext: python -m predictor train")
    elif not gathered.failed:
        print("runs of other shards are missing: the last shard to end packs them all")
    return 1 if gathered.failed else 0


def _pretrain(flags: argparse.Namespace) -> None:
    from collect.pretrain import pretrain
    from collect.workloads.transfer import WEIGHTS

    pretrain(flags.out or WEIGHTS, device=flags.device)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit()) or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: give i/n with i from 1 to n, such as 2/8")
    return int(number), int(count)


if __name__ == "__main__":
    cli.run(main)

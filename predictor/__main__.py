"""`python -m predictor train | prefix | tune | show`: make a freeze predictor, search settings, read a file."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from predictor.errors import DivergedError, UsageError
from predictor.model.config import PredictorConfig
from predictor.shared import flags as cli
from predictor.shared.tracking import add_wandb_flag, start_tracker

if TYPE_CHECKING:
    from data.dataset.windows import Rule
    from predictor.model.sampling import SampleSpec
    from predictor.training.dataset import WindowSet
    from predictor.training.splits import HeldOut
    from predictor.training.study_storage import SharedStudy

_DATA = Path("runs/trajectories.h5")
_OUT = Path("runs/predictor.safetensors")
_STUDY = Path("runs/tune")
# What a trial of `tune` does not choose itself.
_FIXED = ("epochs", "patience", "epoch_windows", "validation", "test", "split_seed", "seed", "device")


def main(argv: Sequence[str] | None = None) -> int | None:
    if find_spec("predictor.training") is None:
        raise UsageError(
            "predictor.training is not in the installed library: run `python -m predictor` from a checkout of the "
            "repository; freezing with the predictor that ships needs none"
        )
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = _parser().parse_args(arguments)
    if getattr(flags, "settings", None):
        from predictor.training.tuned_settings import settings_flags

        # The user's own flags come last, and so override those of the file.
        arguments = [arguments[0], *settings_flags(flags.settings), *arguments[1:]]
        flags = _parser().parse_args(arguments)
    if flags.command == "train":
        flags.given = {argument.partition("=")[0] for argument in arguments}
    commands = {"train": _train, "prefix": _prefix, "tune": _tune, "show": _show}
    try:
        return commands[flags.command](flags)
    except DivergedError as error:
        raise UsageError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    """A parser whose errors repeat no URL: it may hold a password."""

    def error(self, message: str) -> NoReturn:
        from predictor.training.study_storage import without_secrets

        super().error(without_secrets(message))


def _parser() -> argparse.ArgumentParser:
    from collect.jobs.options import add_job_options
    from predictor.training.config import FitConfig, TuneConfig

    parser = _Parser(prog="python -m predictor", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | prefix | tune | show")
    train = commands.add_parser("train", help="from trajectories to a predictor file, with held-out figures")
    _add_data_flags(train)
    train.add_argument("--out", type=Path, default=_OUT, help="the file to write (default: %(default)s)")
    train.add_argument("--settings", type=Path, help="settings that `tune` found; flags given here override them")
    text = "also train without each family in turn and test on it: does the predictor transfer? (default: yes)"
    train.add_argument("--transfer", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "train on labels of this CKA; the figures still use --label-threshold"
    train.add_argument("--learn-threshold", type=float, help=text)
    cli.add_fields(train, PredictorConfig)
    cli.add_fields(train, FitConfig)
    text = "add to a predictor what prefixes cost that freeze before the first step"
    prefix = commands.add_parser("prefix", help=text, description=f"{text[0].upper()}{text[1:]}.")
    text = "files of `python -m collect gather outcomes` that begin at --points 0"
    prefix.add_argument("--outcomes", nargs="+", type=Path, required=True, metavar="PATH", help=text)
    text = "the predictor to add it to: a file, or `shipped` (default: %(default)s)"
    prefix.add_argument("--predictor", default="shipped", metavar="PATH", help=text)
    text = "from the runs that start from scratch, for such trainings; without it from the others, for the others"
    prefix.add_argument("--scratch", action="store_true", help=text)
    prefix.add_argument("--out", type=Path, default=_OUT, help="the file to write (default: %(default)s)")
    tune = commands.add_parser("tune", help="search for better settings with Optuna; continues an interrupted study")
    _add_data_flags(tune)
    tune.add_argument("--out", type=Path, default=_STUDY, help="folder of the study (default: %(default)s)")
    _add_storage_flags(tune)
    text = (
        "trials at once; the more, the less they learn from each other (default: 1; on a cluster a fifth of --trials)"
    )
    tune.add_argument("--slots", type=int, help=text)
    add_job_options(tune)
    cli.add_fields(tune, TuneConfig)
    cli.add_fields(tune, FitConfig, only=_FIXED)
    show = commands.add_parser("show", help="print what a predictor file is and its figures")
    show.add_argument("file", type=Path, nargs="?", default=_OUT, help="(default: %(default)s)")
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    text = "trajectory files or gather folders (default: runs/trajectories.h5)"
    parser.add_argument("--data", type=Path, nargs="+", default=[_DATA], metavar="PATH", help=text)
    text = "a layer may freeze once its CKA to the final network stays at least this high (default: %(default)s)"
    parser.add_argument("--label-threshold", type=float, default=0.98, help=text)
    text = "how far it may fall below that again (default: %(default)s)"
    parser.add_argument("--label-dip", type=float, default=0.0, help=text)
    text = "take labels from what freezing did: files of `python -m collect gather outcomes` of the same runs"
    parser.add_argument("--outcomes", nargs="+", type=Path, metavar="PATH", help=text)
    text = "with --outcomes: a layer may freeze if freezing the prefix up to it costs at most so many percentage "
    text += "points of accuracy (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=0.5, help=text)
    text = "families and sources that are kept from training and used for evaluation: a TOML file, or `none` for a "
    text += "predictor that is used and not evaluated (default: data/dataset/held_out.toml)"
    parser.add_argument("--held-out", metavar="PATH", help=text)
    add_wandb_flag(parser)


def _add_storage_flags(parser: argparse.ArgumentParser) -> None:
    from predictor.training.study_storage import STORAGE_VARIABLE, STUDY_NAME

    text = "share the study with other machines: postgresql://USER@HOST/DATABASE, mysql://... or a journal file on a "
    text += f"shared disk (default: ${STORAGE_VARIABLE}, where no process list shows it, or else none: an SQLite file "
    text += "in --out)"
    parser.add_argument("--storage", metavar="URL|FILE", help=text)
    text = f"with --storage: what the study is called there (default: {STUDY_NAME})"
    parser.add_argument("--study", metavar="NAME", help=text)


def _train(flags: argparse.Namespace) -> None:
    from data.dataset.windows import part_of
    from predictor.training.config import CKA_LABEL_FLAGS, OUTCOME_LABEL_FLAG, FitConfig
    from predictor.training.continued import continued
    from predictor.training.train import TrainingData, train
    from predictor.training.tuned_settings import check_settings

    if flags.out.suffix != _OUT.suffix:
        raise UsageError(f"--out {flags.out}: name a file that ends in {_OUT.suffix}")
    if flags.outcomes and flags.learn_threshold is not None:
        raise UsageError("--learn-threshold is for labels from CKA: leave it out, or --outcomes")
    config, settings = continued(
        cli.from_flags(PredictorConfig, flags), cli.from_flags(FitConfig, flags), vars(flags).pop("given")
    )
    _use_one_thread()
    held_out = _held_out(flags)
    if flags.settings:
        check_settings(flags.settings, held_out)
    rule = _rule(flags, held_out)
    windows, spec = _read(flags, config.window, rule, held_out)
    names = (OUTCOME_LABEL_FLAG,) if flags.outcomes else CKA_LABEL_FLAGS
    data = TrainingData(
        windows,
        spec,
        held_out,
        unseen=lambda window: part_of("held-out", flags.data, window, rule, held_out),
        files=[path.name for path in flags.data],
        labels={name: getattr(flags, name) for name in names},
        learn_from=_relabelled(flags, windows, flags.learn_threshold, held_out)
        if flags.learn_threshold is not None
        else None,
    )
    with start_tracker("train", flags.wandb, flags.out.with_suffix(""), _as_json(flags)) as tracker:
        train(data, config, settings, flags.out, with_transfer=flags.transfer, tracker=tracker)


def _prefix(flags: argparse.Namespace) -> None:
    from dataclasses import replace

    from data.outcomes.first_prefixes import first_prefixes
    from data.outcomes.records import read_outcomes
    from predictor.model.file import load_predictor, save_predictor
    from predictor.model.first_prefix import PrefixModel
    from predictor.policies.smartfrz import SHIPPED
    from predictor.training.card import first_prefix_text
    from predictor.training.first_prefix import fit_first_prefix

    file = load_predictor(SHIPPED if flags.predictor == "shipped" else flags.predictor)
    runs = first_prefixes((outcome for path in flags.outcomes for outcome in read_outcomes(path)), flags.scratch)
    model, figures = fit_first_prefix(runs)
    figures |= {"files": [path.name for path in flags.outcomes]}
    known = file.prefix or PrefixModel(0.0)  # which allows nothing
    if flags.scratch:
        prefix, card = replace(known, scratch=model), {**file.card, "first_prefix_scratch": figures}
    else:
        prefix, card = replace(model, scratch=known.scratch), {**file.card, "first_prefix": figures}
    save_predictor(flags.out, replace(file, prefix=prefix, card=card))
    print(f"{first_prefix_text(card, flags.scratch)}\n{flags.out}")


def _tune(flags: argparse.Namespace) -> None:
    from collect.jobs.options import job_options
    from collect.search.fold_jobs import FoldJobs
    from collect.search.task_source import TaskSource
    from predictor.training import plots
    from predictor.training.config import FitConfig, TuneConfig
    from predictor.training.tune import tune
    from predictor.training.tuned_settings import BEST_FILE, describe

    config, settings = cli.from_flags(TuneConfig, flags), cli.from_flags(FitConfig, flags)
    options = job_options(flags)
    at_once = flags.slots if flags.slots is not None else 1 if options.one_machine else max(2, config.trials // 5)
    if at_once < 1:
        raise UsageError(f"slots={at_once}: give the number of trials at once, from 1")
    in_jobs = at_once > 1 or not options.one_machine
    shared = _shared_study(flags, in_jobs)
    _use_one_thread()
    held_out = _held_out(flags)
    labels = {name: getattr(flags, name) for name in ("label_threshold", "label_dip", "tolerance")}
    files, answers = (tuple(str(path.absolute()) for path in paths or ()) for paths in (flags.data, flags.outcomes))
    source = TaskSource(files, answers, **labels, held_out=held_out, config=config, settings=settings)
    task = source.read()
    _say_what_was_read(flags, task.reference, held_out)
    elsewhere = FoldJobs(source, task.fingerprint, flags.out, at_once, options) if in_jobs else None
    with start_tracker("tune", flags.wandb, flags.out, _as_json(flags)) as tracker:
        study = tune(task, flags.out, tracker=tracker, shared=shared, elsewhere=elsewhere)
    drawn = plots.study(study, flags.out)
    print(describe(study, config))
    print(f"plots: {', '.join(str(path) for path in drawn) or 'none, too few trials'}")
    outcomes = f" --outcomes {' '.join(map(str, flags.outcomes))}" if flags.outcomes else ""
    data = f" --data {' '.join(map(str, flags.data))}" if flags.data != [_DATA] else ""
    split = f" --held-out {flags.held_out}" if flags.held_out else ""
    print(f"next: python -m predictor train --settings {flags.out / BEST_FILE}{data}{outcomes}{split}")


def _shared_study(flags: argparse.Namespace, in_jobs: bool) -> "SharedStudy | None":
    """The study of `--storage`, reached before any data are read. What is logged of the flags then has no secrets."""
    from predictor.training.study_storage import STORAGE_VARIABLE, STUDY_NAME, SharedStudy, say, without_secrets

    given, name = vars(flags).pop("storage"), vars(flags).pop("study")
    storage = given or os.environ.get(STORAGE_VARIABLE)
    if not storage:
        if name is not None:
            raise UsageError(f"--study {name}: without --storage a study is a file in --out, which is its name")
        return None
    if in_jobs:
        raise UsageError(
            "--storage with --slots or --engine ray: give one of them. With --storage, start the command as often as "
            "trials are to run at once"
        )
    # wandb stores the command as well.
    sys.argv[:] = [without_secrets(argument) for argument in sys.argv]
    shared = SharedStudy(storage, name or STUDY_NAME)
    if given and shared.holds_password:
        say(f"--storage holds a password, which lists of processes show: better give the URL in {STORAGE_VARIABLE}")
    shared.connect()
    vars(flags).update(storage=shared.shown, study=shared.name)
    return shared


def _show(flags: argparse.Namespace) -> None:
    from predictor.model.file import fingerprint, load_predictor
    from predictor.training.card import show

    file = load_predictor(flags.file)
    print(f"{flags.file} (sha256 {fingerprint(flags.file)}...)\n{show(file)}")


def _read(flags: argparse.Namespace, window: int, rule: "Rule", held_out: "HeldOut") -> "tuple[WindowSet, SampleSpec]":
    from data.dataset.windows import spec_of, trajectories_in, windows_from

    windows = windows_from(flags.data, window, rule, held_out)
    _say_what_was_read(flags, windows, held_out)
    return windows, spec_of(next(trajectories_in(flags.data)))


def _say_what_was_read(flags: argparse.Namespace, windows: "WindowSet", held_out: "HeldOut") -> None:
    from predictor.training.card import held_out_text
    from predictor.training.splits import families_of

    families = families_of(windows.runs)
    print(
        f"{', '.join(map(str, flags.data))}: {len(windows.runs)} finished runs of {len(families)} families "
        f"({', '.join(families)}), {len(windows):,} windows, {windows.labels_N.double().mean():.1%} of them freezable\n"
        f"held out: {held_out_text(asdict(held_out))}"
    )


def _rule(flags: argparse.Namespace, held_out: "HeldOut") -> "Rule":
    from data.dataset.windows import outcome_rule
    from data.trajectories.labels import LabelRule

    if flags.outcomes is None:
        return LabelRule(flags.label_threshold, flags.label_dip)
    return outcome_rule(flags.outcomes, flags.tolerance, held_out)


def _held_out(flags: argparse.Namespace) -> "HeldOut":
    from data.dataset.windows import SHIPPED_SPLIT
    from predictor.training.config import NOTHING
    from predictor.training.splits import HeldOut, read_held_out

    if flags.held_out == NOTHING:
        return HeldOut()
    return read_held_out(Path(flags.held_out or SHIPPED_SPLIT))


def _relabelled(flags: argparse.Namespace, windows: "WindowSet", threshold: float, held_out: "HeldOut") -> "WindowSet":
    from data.dataset.windows import relabelled
    from data.trajectories.labels import LabelRule

    return relabelled(windows, flags.data, LabelRule(threshold, flags.label_dip), held_out)


def _as_json(flags: argparse.Namespace) -> dict[str, Any]:
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in vars(flags).items()}


def _use_one_thread() -> None:
    """These tensors are so small that several threads gain nothing, and on busy cores they lose much."""
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    cli.run(main)

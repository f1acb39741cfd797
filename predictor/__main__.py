"""`python -m predictor train | tune | show`: train a freeze predictor on trajectories, search settings, read a file."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.errors import DivergedError, UsageError
from predictor.shared import flags as cli
from predictor.shared.tracking import add_wandb_flag, start_tracker
from predictor.training.settings import LABEL_FLAGS, NOTHING, TOLERANCE_FLAG, check_settings, flags_in

if TYPE_CHECKING:
    from data.dataset.windows import Rule
    from predictor.model.network import PredictorConfig
    from predictor.model.sampling import SampleSpec
    from predictor.training.fit import FitConfig, FitResult
    from predictor.training.splits import HeldOut
    from predictor.training.windows import WindowSet

_DATA = Path("runs/trajectories.h5")
_OUT = Path("runs/predictor.safetensors")
_STUDY = Path("runs/tune")
# What a trial of `tune` does not choose itself.
_FIXED = ("epochs", "patience", "epoch_windows", "validation", "test", "split_seed", "seed", "device")
_LEARN_THRESHOLDS = (0.95, 0.97, 0.99)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = _parser().parse_args(arguments)
    if getattr(flags, "settings", None):
        # Before the user's own flags, which so have the last word.
        flags = _parser().parse_args([arguments[0], *flags_in(flags.settings), *arguments[1:]])
    commands = {"train": _train, "tune": _tune, "show": _show}
    try:
        return commands[flags.command](flags)
    except DivergedError as error:
        raise UsageError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m predictor", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | tune | show")
    train = commands.add_parser("train", help="from trajectories to a predictor file, with held-out figures")
    _add_data_flags(train)
    train.add_argument("--out", type=Path, default=_OUT, help="the file to write (default: %(default)s)")
    train.add_argument("--settings", type=Path, help="settings that `tune` found; flags given here go before them")
    text = "also train without each family in turn and test on it: does the predictor transfer? (default: yes)"
    train.add_argument("--transfer", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "learn from labels of this CKA, but be judged by the others"
    train.add_argument("--learn-threshold", type=float, help=text)
    cli.add_fields(train, "predictor/model/network.py", "PredictorConfig")
    cli.add_fields(train, "predictor/training/fit.py", "FitConfig")
    tune = commands.add_parser("tune", help="search for better settings with Optuna; going on where it was killed")
    _add_data_flags(tune)
    tune.add_argument("--out", type=Path, default=_STUDY, help="folder of the study (default: %(default)s)")
    cli.add_fields(tune, "predictor/training/objective.py", "TuneConfig")
    cli.add_fields(tune, "predictor/training/fit.py", "FitConfig", only=_FIXED)
    show = commands.add_parser("show", help="what a predictor file is and how well it does")
    show.add_argument("file", type=Path, nargs="?", default=_OUT, help="(default: %(default)s)")
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    text = "trajectory files or gather folders (default: runs/trajectories.h5)"
    parser.add_argument("--data", type=Path, nargs="+", default=[_DATA], metavar="PATH", help=text)
    text = "a layer may freeze once its CKA to the final network stays at least this high (default: %(default)s)"
    parser.add_argument("--label-threshold", type=float, default=0.98, help=text)
    text = "how far it may fall below that again (default: %(default)s)"
    parser.add_argument("--label-dip", type=float, default=0.0, help=text)
    text = "take labels from what freezing really did: files of `python -m collect gather outcomes` of the same runs"
    parser.add_argument("--outcomes", nargs="+", type=Path, metavar="PATH", help=text)
    text = "with --outcomes: a layer may freeze where freezing the front up to it costs at most so many percentage "
    text += "points of accuracy (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=0.5, help=text)
    text = "families and sources that are not learnt from but judged on: a TOML file, or `none` for a predictor to be "
    text += "used and not judged (default: data/dataset/held_out.toml)"
    parser.add_argument("--held-out", metavar="PATH", help=text)
    add_wandb_flag(parser)


def _train(flags: argparse.Namespace) -> None:
    from tqdm import tqdm

    from predictor.model.network import PredictorConfig
    from predictor.training.evaluation import known, panel_of, unseen
    from predictor.training.fit import FitConfig, fit
    from predictor.training.thresholds import families_of, with_risks

    if flags.out.suffix != _OUT.suffix:
        raise UsageError(f"--out {flags.out}: name a file that ends in {_OUT.suffix}")
    config, settings = cli.from_flags(PredictorConfig, flags), cli.from_flags(FitConfig, flags)
    _use_one_thread()
    held_out = _held_out(flags)
    if flags.settings:
        check_settings(flags.settings, held_out)
    rule = _rule(flags)
    windows, spec = _read(flags, config.window, rule, held_out)
    if config.weights > spec.weights:
        print(f"weights: {config.weights} asked for, {spec.weights} recorded: taking those")
        config = replace(config, weights=spec.weights)
    learn_from = None
    if flags.learn_threshold is not None:
        learn_from = _relabelled(flags, windows, flags.learn_threshold, held_out)
    with start_tracker("train", flags.wandb, flags.out.with_suffix(""), _told(flags)) as tracker:
        result = fit(windows, spec, config, settings, learn_from=learn_from, tracker=tracker)
        card = _card(flags, windows, result, settings, held_out)
        if flags.outcomes:
            families = tqdm(families_of(windows), desc="judging each family by the others", unit="family")
            result, told = with_risks(result, windows, config, settings, families)
            card |= told
        panel = panel_of(windows, result, settings, learn_from)
        card["test"] = known(panel, windows.subset(result.split.test))
        card["unseen"] = unseen(panel, _held_out_windows(flags, config.window, rule, held_out))
        _finish(flags, windows, learn_from, result, config, settings, card)
        figures = {f"test_{name}": value for name, value in card["test"]["overall"]["attention"].items()}
        tracker.log(figures, len(result.fitted.history))


def _finish(
    flags: argparse.Namespace,
    windows: "WindowSet",
    learn_from: "WindowSet | None",
    result: "FitResult",
    config: "PredictorConfig",
    settings: "FitConfig",
    card: dict[str, Any],
) -> None:
    """Write, draw and print. The file is written before the long part, so that breaking it off loses nothing."""
    from tqdm import tqdm

    from predictor.model.file import save_predictor
    from predictor.shared.files import write_json
    from predictor.training import plots
    from predictor.training.card import figures_text, why
    from predictor.training.evaluation import transfer

    folder = flags.out.with_suffix("")
    save_predictor(flags.out, result.file(card))
    plots.learning_curve(result.fitted.history, result.fitted.best_epoch, folder / "learning_curve.png")
    plots.calibration_curve(card["test"]["calibration"], folder / "calibration.png")
    if flags.transfer:
        card["transfer"] = transfer(
            windows,
            result.split,
            config,
            settings,
            learn_from=learn_from,
            watch=lambda families: tqdm(families, desc="leaving a family out", unit="family"),
        )
        save_predictor(flags.out, result.file(card))
    plots.families(card["test"], card.get("transfer"), folder / "families.png")
    runs = {part: [windows.runs[place].run_id for place in places] for part, places in asdict(result.split).items()}
    write_json(folder / "metrics.json", {**card, "split": runs, "history": result.fitted.history})
    print(f"\n{figures_text(card)}\n")
    print(
        f"epoch {result.fitted.best_epoch} of {len(result.fitted.history)} kept; freezes from probability "
        f"{result.threshold:.4f}{why(card)}\nwritten: {flags.out}, and plots and metrics.json in {folder}/"
    )


def _card(
    flags: argparse.Namespace, windows: "WindowSet", result: "FitResult", settings: "FitConfig", held_out: "HeldOut"
) -> dict[str, Any]:
    from predictor.training.card import provenance, training_data

    return {
        "labels": {TOLERANCE_FLAG: flags.tolerance}
        if flags.outcomes
        else {name: getattr(flags, name) for name in LABEL_FLAGS},
        "held_out": asdict(held_out),
        "data": training_data(windows, asdict(result.split), [path.name for path in flags.data]),
        "training": {
            **asdict(settings),
            "best_epoch": result.fitted.best_epoch,
            "epochs": len(result.fitted.history),
            "fit_seconds": result.fitted.fit_seconds,
        },
        "provenance": provenance(),
    }


def _tune(flags: argparse.Namespace) -> None:
    from predictor.training import plots
    from predictor.training.fit import FitConfig
    from predictor.training.objective import Task, TuneConfig
    from predictor.training.tune import BEST_FILE, tune

    config, settings = cli.from_flags(TuneConfig, flags), cli.from_flags(FitConfig, flags)
    _use_one_thread()
    held_out = _held_out(flags)
    windows, _ = _read(flags, 3, _rule(flags), held_out)
    task = Task(*_labelled(flags, windows, held_out), config, settings)
    with start_tracker("tune", flags.wandb, flags.out, _told(flags)) as tracker:
        study = tune(task, flags.out, tracker=tracker)
    drawn = plots.study(study, flags.out)
    # The first that was not broken off has the default settings.
    default = next(trial.value for trial in study.get_trials(deepcopy=False) if trial.state.name != "FAIL")
    print(
        f"best of {len(study.trials)} trials: {config.score} {study.best_value:.3f} on families left out "
        f"(the default settings: {'n/a' if default is None else f'{default:.3f}'}), by these settings:"
    )
    print("\n".join(f"  {name} {value}" for name, value in sorted(study.best_params.items())))
    print(f"plots: {', '.join(str(path) for path in drawn) or 'none, too few trials'}")
    outcomes = f" --outcomes {' '.join(map(str, flags.outcomes))}" if flags.outcomes else ""
    data = f" --data {' '.join(map(str, flags.data))}" if flags.data != [_DATA] else ""
    split = f" --held-out {flags.held_out}" if flags.held_out else ""
    print(f"next: python -m predictor train --settings {flags.out / BEST_FILE}{data}{outcomes}{split}")


def _show(flags: argparse.Namespace) -> None:
    from predictor.model.file import fingerprint, load_predictor
    from predictor.training.card import show

    file = load_predictor(flags.file)
    print(f"{flags.file} (sha256 {fingerprint(flags.file)}...)\n{show(file)}")


def _read(flags: argparse.Namespace, window: int, rule: "Rule", held_out: "HeldOut") -> "tuple[WindowSet, SampleSpec]":
    from data.dataset.windows import spec_of, trajectories_in, windows_from
    from predictor.training.card import held_out_text

    windows = windows_from(flags.data, window, rule, held_out)
    spec = spec_of(next(trajectories_in(flags.data)))
    families = sorted({run.family for run in windows.runs})
    print(
        f"{', '.join(map(str, flags.data))}: {len(windows.runs)} finished runs of {len(families)} families "
        f"({', '.join(families)}), {len(windows):,} windows, {windows.labels_N.double().mean():.1%} of them freezable\n"
        f"not learnt from: {held_out_text(asdict(held_out))}"
    )
    return windows, spec


def _held_out_windows(flags: argparse.Namespace, window: int, rule: "Rule", held_out: "HeldOut") -> "WindowSet":
    """What a trained predictor is judged on, at last. Nothing else may ask for it."""
    from data.dataset.windows import part_of

    return part_of("held-out", flags.data, window, rule, held_out)


def _rule(flags: argparse.Namespace) -> "Rule":
    """What makes a window freezable."""
    from data.dataset.windows import OutcomeRule
    from data.outcomes.accuracy_cost import accuracy_costs
    from data.outcomes.records import read_outcomes
    from data.trajectories.labels import LabelRule

    if flags.outcomes is None:
        return LabelRule(flags.label_threshold, flags.label_dip)
    if not flags.tolerance > 0:
        raise UsageError(f"--tolerance {flags.tolerance}: give percentage points above 0")
    if getattr(flags, "learn_threshold", None) is not None:
        raise UsageError("--learn-threshold is for labels from CKA: leave it out, or --outcomes")
    outcomes = [outcome for path in flags.outcomes for outcome in read_outcomes(path)]
    return OutcomeRule(accuracy_costs(outcomes, _held_out(flags)), flags.tolerance)


def _held_out(flags: argparse.Namespace) -> "HeldOut":
    from data.dataset.windows import SHIPPED_SPLIT
    from predictor.training.splits import HeldOut, read_held_out

    if flags.held_out == NOTHING:
        return HeldOut()
    return read_held_out(Path(flags.held_out or SHIPPED_SPLIT))


def _labelled(
    flags: argparse.Namespace, windows: "WindowSet", held_out: "HeldOut"
) -> "tuple[dict[float, WindowSet], float, dict[str, float]]":
    """What trials of `tune` may learn from, the key of what they are judged by, and the flags that make its labels."""
    if flags.outcomes:
        return {flags.tolerance: windows}, flags.tolerance, {TOLERANCE_FLAG: flags.tolerance}
    others = [threshold for threshold in _LEARN_THRESHOLDS if threshold != flags.label_threshold]
    labelled = {flags.label_threshold: windows, **{t: _relabelled(flags, windows, t, held_out) for t in others}}
    labels = {name: getattr(flags, name) for name in ("label_threshold", "label_dip")}
    return labelled, flags.label_threshold, labels


def _relabelled(flags: argparse.Namespace, windows: "WindowSet", threshold: float, held_out: "HeldOut") -> "WindowSet":
    """The same windows with labels of another threshold; the weights are shared."""
    from data.dataset.windows import windows_from
    from data.trajectories.labels import LabelRule

    rule = LabelRule(threshold, flags.label_dip)
    others = windows_from(flags.data, windows.window, rule, held_out).runs
    pairs = zip(windows.runs, others, strict=True)
    return replace(windows, runs=tuple(replace(run, labels_TL=other.labels_TL) for run, other in pairs))


def _told(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON can say them."""
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in vars(flags).items()}


def _use_one_thread() -> None:
    """These tensors are so small that threads gain nothing, and on cores that are busy they lose much."""
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    cli.run(main)

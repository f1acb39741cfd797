"""What there is to train on and to evaluate on: runs, windows, class balance, and what single features say alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from data.dataset.windows import SHIPPED_SPLIT, Part, part_of
from data.trajectories.labels import LabelRule
from predictor.model.config import PredictorConfig
from predictor.training.card import figure, held_out_text, percent, table, text
from predictor.training.dataset import RunWindows, WindowSet
from predictor.training.metrics import Bools, auroc
from predictor.training.splits import HeldOut, read_held_out

_ALONE = (("progress", "progress"), ("log learning rate", "log_lr"), ("depth", "depth"))
_LEGEND = """\
AUROC: the chance that of a freezable window and one that is not yet, the freezable one has the higher value; .5 by
guessing, below it where low values mean freezable. n/a: there are no windows, or all of one class."""


def data_card(
    paths: Sequence[Path],
    rule: LabelRule | None = None,
    held_out: HeldOut | None = None,
    window: int = PredictorConfig().window,
) -> str:
    """Counts, class balance and the AUROC of single features, for the runs to train on and those held out, as text.

    Args:
        paths: trajectory files or gather folders.
        rule: what labels a layer freezable.
        held_out: the families and sources of the second part. By default what data/dataset/held_out.toml names.
        window: snapshots in a window. Only finished runs that have as many count.

    Raises:
        FileFault: for a damaged run.
        UsageError: for runs that a training would refuse together.
    """
    rule = rule or LabelRule()
    held_out = read_held_out(SHIPPED_SPLIT) if held_out is None else held_out
    parts = {part: part_of(part, paths, window, rule, held_out) for part in get_args(Part)}
    names = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    dip = f", dips of {rule.dip} allowed" if rule.dip else ""
    kept = held_out_text(vars(held_out)) if any(vars(held_out).values()) else "nothing"
    head = (
        f"{names}: finished runs, in windows of {window} snapshots of a layer\nfreezable: CKA to the final network at "
        f"least {rule.threshold} from there to the end{dip}\nheld out: {kept}"
    )
    tables = [
        _counts(parts),
        _groups("family", parts, lambda run: run.family),
        _groups("source", parts, lambda run: run.source),
        _by_progress(parts),
        _alone(parts),
    ]
    return "\n\n".join([head, *tables, _LEGEND]) + "\n"


def _counts(parts: dict[Part, WindowSet]) -> str:
    return table(["part", "runs", "layers", "windows", "freezable"], [[p, *_row(w)] for p, w in parts.items()])


def _groups(title: str, parts: dict[Part, WindowSet], name_of: Callable[[RunWindows], str]) -> str:
    """The counts by family or by source. One with runs in both parts has two rows."""
    rows = []
    for part, windows in parts.items():
        for name in sorted({name_of(run) for run in windows.runs}):
            own = [index for index, run in enumerate(windows.runs) if name_of(run) == name]
            rows.append([text(name)[:40], part, *_row(windows.subset(own))])
    return table([title, "part", "runs", "layers", "windows", "freezable"], rows)


def _row(windows: WindowSet) -> list[str]:
    layers = sum(run.labels_TL.shape[1] for run in windows.runs)
    labels_N = _labels(windows)
    return [text(len(windows.runs)), text(layers), text(len(labels_N)), _balance(labels_N)]


def _by_progress(parts: dict[Part, WindowSet]) -> str:
    """Windows by the tenth of the training in which their newest snapshot lies."""
    tenths = {part: _tenths(windows) for part, windows in parts.items()}
    rows = []
    for tenth in range(10):
        row = [f"{10 * tenth} to {10 * tenth + 10} %"]
        for part, windows in parts.items():
            labels_N = _labels(windows)[tenths[part] == tenth]
            row += [text(len(labels_N)), _balance(labels_N)]
        rows.append(row)
    heads = [f"{part}\n{column}" for part in parts for column in ("windows", "freezable")]
    return table(["training done", *heads], rows)


def _tenths(windows: WindowSet) -> npt.NDArray[np.int64]:
    """The tenth of each window, 0 to 9. A progress of 1 is in the last."""
    if not windows.runs:
        return np.zeros(0, dtype=np.int64)
    # A progress of 32 bits may lie a little below the tenth that it stands for.
    tenth_N = np.floor(windows.features_NF("progress")[:, 0].double().numpy() * 10 + 1e-6)
    return np.clip(tenth_N, 0, 9).astype(np.int64)


def _alone(parts: dict[Part, WindowSet]) -> str:
    rows = [[title, *(figure(_auroc(windows, name)) for windows in parts.values())] for title, name in _ALONE]
    return table(["AUROC of one feature alone", *parts], rows)


def _auroc(windows: WindowSet, feature: str) -> float | None:
    if not windows.runs:
        return None
    return auroc(_labels(windows), windows.features_NF(feature)[:, 0].double().numpy())


def _labels(windows: WindowSet) -> Bools:
    labels_N: Bools = windows.labels_N.numpy() if windows.runs else np.zeros(0, dtype=np.bool_)
    return labels_N


def _balance(labels_N: Bools) -> str:
    return percent(float(labels_N.mean())) if len(labels_N) else "n/a"

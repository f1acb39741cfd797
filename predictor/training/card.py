"""A predictor's card: what it was trained on and how well it does, as JSON in its file and as text in the terminal."""

import math
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import predictor
from predictor.model.file import PredictorFile
from predictor.training.dataset import WindowSet
from predictor.training.evaluation import CLASSIFIERS
from predictor.training.splits import families_of
from predictor.training.thresholds import DEFAULT_RISK

_MOST_ROWS = 100
_MOST_GROUPS = 40
_LEGEND = """\
AUROC, AP: chance to rank a freezable window above one that is not, and average precision; .5 and the class's share
by guessing. AP not ready: of finding the windows that may not be frozen yet, the harder class.
found: share of freezable windows frozen at the threshold. wrongly frozen: share of those that may not be frozen yet.
false freezes: share of all its freezes that are wrong. n/a: there is one class only, or nothing is frozen."""
_AT_HALF = """\
Each classifier's threshold was chosen on validation runs of the families it knows. At half: false freezes at the
threshold that freezes half of these freezable windows, which measures the ranking alone."""
_REPLAYED = """\
What the runs would have lost and saved with a growing frozen prefix, each predicted by a predictor that was trained on
the other families (pp: percentage points of accuracy, as means; FLOPs of full training without a cache). The thresholds
were chosen on all of these runs, including the test runs:"""
_NOTHING_HELD_OUT = "nothing. This predictor is for use and not for evaluation: it has seen every family and source"
_INPUTS = {"gain": "motion, gain and clock", "motion": "motion and clock", "raw": "raw weights"}
_COLUMNS = (
    ("accuracy", "accuracy"),
    ("AUROC", "auroc"),
    ("AP\nfreezable", "precision_freezable"),
    ("AP\nnot ready", "precision_not_yet"),
    ("Brier", "brier"),
    ("calibration\nerror", "calibration_error"),
    ("found", "found"),
    ("wrongly\nfrozen", "wrongly_frozen"),
    ("false\nfreezes", "false_freezes"),
)
_COMPARED = (("AUROC", "auroc"), ("AP not ready", "precision_not_yet"), ("false freezes", "false_freezes"))
_SHOWN = ("clock", "hand-made", "attention")
_UNSEEN = (
    ("AUROC", "auroc"),
    ("AP not ready", "precision_not_yet"),
    ("calibration error", "calibration_error"),
    ("found", "found"),
    ("false freezes", "false_freezes"),
    ("false freezes at half", "false_freezes_at_half"),
)


def training_data(windows: WindowSet, parts: dict[str, Sequence[int]], files: Sequence[str]) -> dict[str, Any]:
    """What a predictor was trained and tested on. `parts` holds the indices of the runs in train, validation, test."""
    families = {
        family: {part: sum(windows.runs[run].family == family for run in runs) for part, runs in parts.items()}
        for family in families_of(windows.runs)
    }
    return {
        "files": list(files),
        "runs": len(windows.runs),
        "windows": len(windows),
        "freezable": float(windows.labels_N.double().mean()),
        "families": families,
        "sources": dict(Counter(run.source for run in windows.runs)),
    }


def provenance() -> dict[str, str]:
    """When a predictor is made, and with what."""
    import torch

    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "smartfrz": predictor.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(file: PredictorFile) -> str:
    """A predictor as text, from its file alone. What the card lacks is n/a. Control characters are left out."""
    config, spec = asdict(file.model.config), file.spec
    inputs = _INPUTS[config["inputs"]]
    parameters = sum(parameter.numel() for parameter in file.model.parameters())
    rows = [
        ("input", f"{inputs}: the last {config['window']} snapshots of {config['weights']} weights of a layer"),
        ("network", f"{parameters:,} parameters; hidden {config['hidden']}, key {config['key']}"),
        ("sampling", f"{spec.weights} weights a layer, {spec.snapshots} snapshots a training, seed {spec.seed}"),
        ("threshold", f"freezes from probability {file.threshold:.4f}{why(file.card)}{_weighed(file)}"),
        *_facts(file.card),
    ]
    lines = [f"{name:<11} {fact}" for name, fact in rows]
    return "\n".join(["freeze predictor", *lines, "", figures_text(file.card)])


def figures_text(card: Any) -> str:
    """The tables of a card: test figures by classifier, by family, without each family, and on what was held out."""
    parts = [_overall(card), _by_family(card), _transfer(card), _unseen(card), _LEGEND, _risks(card)]
    parts += [first_prefix_text(card), first_prefix_text(card, scratch=True)]
    return "\n\n".join(part for part in parts if part)


def first_prefix_text(card: Any, scratch: bool = False) -> str:
    """The table of a card about prefixes that freeze before the first step; empty where it has none.

    Args:
        card: of a predictor.
        scratch: that of networks from scratch, in place of the others.
    """
    figures = at(card, "first_prefix_scratch" if scratch else "first_prefix")
    if not isinstance(figures, dict):
        return ""
    families = ", ".join(f"{text(name)} {text(count)}" for name, count in _rows(at(figures, "families")))
    replays = at(figures, "replays")
    rows = [
        (text(at(row, "risk")), figure(at(row, "points")), percent(at(row, "flops")))
        for row in (replays[:_MOST_ROWS] if isinstance(replays, list) else ())
    ]
    runs, fitted, fewest, most = (at(figures, name) for name in ("runs", "fitted", "fewest_steps", "most_steps"))
    replayed = text(at(figures, "replayed") or runs)
    shortest = at(figures, "shorter", "fewest_steps") or fewest  # in files of an earlier version
    length = f", of {text(fewest)} to {text(most)} steps" if most else ""
    which = "these" if scratch else f"the {replayed} whose first layer has learned something"
    limits = f"fewer than {text(shortest)} steps" + (f" or more than {text(most)}" if scratch else "")
    when = "before the first step" + (", from scratch" if scratch else "")
    return (
        f"Frozen {when}, learned from {text(runs)} runs: {families}.\n"
        f"What a prefix costs is fitted to {text(fitted or runs)} of them{length}; in the others none may freeze.\n"
        f"What {which} would have lost, and what a step\n"
        "would have cost without a cache, each family by a model that was fitted to the others:\n"
        f"{table(('risk (pp)', 'pp lost', 'FLOPs'), rows)}\n\n"
        f"{'From scratch, in' if scratch else 'In'} trainings of {limits} no layer freezes before the first one."
    )


def held_out_text(held_out: Any) -> str:
    """The families and sources that a card says were held out, in words."""
    names = {kind: _listed(at(held_out, kind)) for kind in ("families", "sources")}
    if not any(names.values()):
        return _NOTHING_HELD_OUT
    return "; ".join(f"{kind} {', '.join(listed)}" for kind, listed in names.items() if listed)


def _facts(card: Any) -> list[tuple[str, str]]:
    data, made = at(card, "data"), at(card, "provenance")
    families = ", ".join(f"{text(name)} {text(at(row, 'train'))}" for name, row in _rows(at(data, "families")))
    epochs = f"epoch {text(at(card, 'training', 'best_epoch'))} of {text(at(card, 'training', 'epochs'))} kept"
    versions = ", ".join(f"{name} {text(at(made, name))}" for name in ("smartfrz", "torch", "python"))
    runs = f"{text(at(data, 'runs'))} runs, {text(at(data, 'windows'))} windows"
    sources = ", ".join(text(name) for name, _ in _rows(at(data, "sources")))
    held_out = at(card, "held_out")
    return [
        ("labels", _rule(at(card, "labels"))),
        ("data", f"{runs}, {percent(at(data, 'freezable'))} freezable; networks trained on {sources or 'n/a'}"),
        ("trained on", f"runs by family: {families or 'n/a'}; {epochs}"),
        # Older cards do not know this split.
        *([("held out", held_out_text(held_out))] if isinstance(held_out, dict) else []),
        *_origin(at(card, "continued_from")),
        ("made", f"{text(at(made, 'made'))} with {versions}"),
    ]


def _origin(before: Any) -> list[tuple[str, str]]:
    """The line about the predictor that was continued, if one was."""
    if not isinstance(before, dict):
        return []
    runs = (
        f"{text(at(before, 'data', 'runs'))} runs of {', '.join(_listed(list(at(before, 'data', 'families') or ())))}"
    )
    labels = _rule(at(before, "labels"))
    return [
        ("continues", f"{text(at(before, 'name'))} (sha256 {text(at(before, 'sha256'))}...), from {runs}: {labels}")
    ]


def _rule(labels: Any) -> str:
    if (tolerance := at(labels, "tolerance")) is not None:
        return f"may be frozen if freezing the prefix up to it costs at most {text(tolerance)} pp of accuracy"
    threshold, dip, learn = (at(labels, name) for name in ("label_threshold", "label_dip", "learn_threshold"))
    rule = f"may be frozen once its CKA to the final network stays at least {text(threshold)}"
    rule += f", dips of {text(dip)} allowed" if dip else ""
    return rule + (f"; trained on labels of {text(learn)}" if learn else "")


def why(card: Any) -> str:
    """What the threshold of a predictor with this card was chosen for, in words."""
    if at(card, "risks") is not None:
        return f", for a risk of {DEFAULT_RISK:g} pp"
    allowed = at(card, "training", "false_freeze")
    return "" if allowed is None else f", the lowest with at most {percent(allowed)} false freezes on validation runs"


def _weighed(file: PredictorFile) -> str:
    return "; that is for all layers, and a smaller prefix needs a higher one" if file.weighs else ""


def _overall(card: Any) -> str:
    overall = at(card, "test", "overall")
    if not isinstance(overall, dict):
        return "No held-out figures in this file."
    figures = at(overall, "attention")
    head = (
        f"Held-out runs, of families it knows: {text(at(figures, 'windows'))} windows, "
        f"{percent(at(figures, 'freezable'))} freezable"
    )
    return f"{head}\n{_by_classifier(overall, _COLUMNS)}"


def _risks(card: Any) -> str:
    rows = at(card, "risks")
    if not isinstance(rows, list):
        return ""
    head = ("risk (pp)", "freezes from", "pp lost", "FLOPs", "pp elsewhere", "FLOPs elsewhere")
    listed = [
        (
            text(at(row, "risk")),
            figure(at(row, "threshold")),
            figure(at(row, "points")),
            percent(at(row, "flops")),
            figure(at(row, "points_elsewhere")),
            percent(at(row, "flops_elsewhere")),
        )
        for row in rows[:_MOST_ROWS]
    ]
    slope, shift = at(card, "calibration", "slope"), at(card, "calibration", "shift")
    # Older cards do not say so: test runs were not left out then.
    among = "without those" if at(card, "calibration", "on_test_runs") is False else "with those"
    line = f"calibrated on the same predictions, {among} of test runs: "
    line += f"logits times {figure(slope)}, plus {figure(shift)}"
    return f"{_REPLAYED}\n{table(head, listed)}" + (f"\n{line}" if slope is not None else "")


def _by_family(card: Any) -> str:
    families = _rows(at(card, "test", "families"))
    if not families:
        return ""
    rows = [
        [
            text(family),
            text(at(row, "attention", "windows")),
            percent(at(row, "attention", "freezable")),
            *(figure(at(row, "attention", key)) for _, key in _COLUMNS),
        ]
        for family, row in families
    ]
    titles = ["family", "windows", "freezable", *(title for title, _ in _COLUMNS)]
    return "The predictor, by family\n" + table(titles, rows)


def _transfer(card: Any) -> str:
    families = _rows(at(card, "transfer", "families"))
    left_out = [f"  {text(name)}: {text(why)}" for name, why in _rows(at(card, "transfer", "left_out"))]
    if not families and not left_out:
        return ""
    rows = [[text(name), *_compared(row)] for name, row in [*families, ("mean", at(card, "transfer", "mean"))]]
    # The figure's name stands over the first of its columns.
    heads = [title if index == 0 else "" for title, _ in _COMPARED for index in range(len(_SHOWN))]
    titles = ["left out", *(f"{head}\n{name}" for head, name in zip(heads, _SHOWN * len(_COMPARED), strict=True))]
    lines = ["Families never seen: trained on all others, tested on the held-out runs of this one"]
    lines += [table(titles, rows)] if families else []
    return "\n".join(lines + (["not tested:", *left_out] if left_out else []))


def _unseen(card: Any) -> str:
    """The figures on the families and sources that were held out. Empty if the card does not know that split."""
    held_out, found = at(card, "held_out"), at(card, "unseen")
    if not isinstance(held_out, dict):
        return ""
    names = held_out_text(held_out)
    if names == _NOTHING_HELD_OUT:
        return f"Held out: {names}."
    overall, groups = at(found, "overall"), at(found, "groups")
    if not isinstance(overall, dict) or not isinstance(groups, list):
        return f"Held out: {names}.\nThere was no run of them: gather some, and train again, for figures on them."
    figures = at(overall, "attention")
    head = (
        "Held out from all training and tuning, by family or by source: "
        f"{text(at(found, 'runs'))} runs in {len(groups)} groups, {text(at(figures, 'windows'))} windows, "
        f"{percent(at(figures, 'freezable'))} freezable"
    )
    columns = [(title.replace(" ", "\n", 1), key) for title, key in _UNSEEN]
    tables = [_by_group(title, key, overall, groups, at(found, "mean")) for title, key in _UNSEEN]
    return "\n\n".join([f"{head}\n{_by_classifier(overall, columns)}\n{_AT_HALF}", _group_counts(groups), *tables])


def _group_counts(groups: Sequence[Any]) -> str:
    rows = [
        [
            _group_name(group),
            text(at(group, "runs")),
            text(at(group, "judges", "attention", "windows")),
            percent(at(group, "judges", "attention", "freezable")),
        ]
        for group in groups[:_MOST_GROUPS]
    ]
    return table(["held out", "runs", "windows", "freezable"], rows)


def _by_group(title: str, key: str, overall: dict[str, Any], groups: Sequence[Any], mean: Any) -> str:
    """One figure of every classifier, by family and source."""
    names = _classifiers_in(overall)
    named = [(_group_name(group), at(group, "judges")) for group in groups[:_MOST_GROUPS]]
    rows = [[group, *(figure(at(row, name, key)) for name in names)] for group, row in [*named, ("mean", mean)]]
    return table([title, *(name.replace(" ", "\n") for name in names)], rows)


def _by_classifier(overall: dict[str, Any], columns: Sequence[tuple[str, str]]) -> str:
    rows = [[name, *(figure(at(overall, name, key)) for _, key in columns)] for name in _classifiers_in(overall)]
    return table(["", *(title for title, _ in columns)], rows)


def _classifiers_in(overall: dict[str, Any]) -> list[str]:
    """The classifiers that a card has figures of. Older cards have fewer."""
    return [name for name in CLASSIFIERS if name in overall]


def _group_name(group: Any) -> str:
    return f"{text(at(group, 'family'))[:20]} on {text(at(group, 'source'))[:20]}"


def _compared(row: Any) -> list[str]:
    return [figure(at(row, name, key)) for _, key in _COMPARED for name in _SHOWN]


def _listed(names: Any) -> list[str]:
    return [text(name)[:40] for name in names[:_MOST_ROWS]] if isinstance(names, list | tuple) else []


def _rows(content: Any) -> list[tuple[str, Any]]:
    return list(content.items())[:_MOST_ROWS] if isinstance(content, dict) else []


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first one to the left. A title may have several lines."""
    from tabulate import tabulate

    words = [title.split("\n") for title in titles]
    height = max(map(len, words))
    # Rows, because tabulate makes columns wider than their headers, and puts lines at the top of a cell.
    heads = zip(*([""] * (height - len(each)) + each for each in words), strict=True)
    align = ["left", *["right"] * (len(titles) - 1)]
    lines = tabulate([*heads, *rows], tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join(line.rstrip() for line in lines.splitlines())


def at(content: Any, *path: str) -> Any:
    """The content at a path of keys, or None."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def number(value: Any) -> float | None:
    """A number that can be shown, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if usable and math.isfinite(value) else None


def figure(value: Any) -> str:
    """Three decimals."""
    found = number(value)
    return "n/a" if found is None else f"{found:.3f}"


def percent(value: Any) -> str:
    """A share as a percentage."""
    found = number(value)
    return "n/a" if found is None else f"{100 * found:.1f} %"


def text(value: Any) -> str:
    """A count or a name on one line."""
    if value is None:
        return "n/a"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 1e15 else "n/a"
    return "".join(letter for letter in str(value)[:200] if letter.isprintable())

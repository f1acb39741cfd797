"""A predictor's card: what it was trained on and how well it does, as JSON in its file and as text in the terminal."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import predictor
from predictor.model.file import PredictorFile
from predictor.training.evaluation import JUDGES
from predictor.training.tables import at, figure, percent, table, text
from predictor.training.thresholds import DEFAULT_RISK
from predictor.training.windows import WindowSet

_MOST_ROWS = 100
_MOST_GROUPS = 40
_LEGEND = """\
AUROC, AP: chance to rank a freezable window above one that is not, and average precision; .5 and the class's share
by guessing. AP not yet: of finding the windows that may not be frozen yet, the harder class.
found: share of freezable windows frozen at the threshold. wrongly frozen: share of not-yet-freezable ones frozen.
false freezes: share of all its freezes that are wrong. n/a: the windows hold one class only, or nothing is frozen."""
_AT_HALF = """\
The validation runs of the families it knows chose each judge's threshold. At half: false freezes where half of these
very freezable windows are frozen, which tells about the ranking alone."""
_REPLAYED = """\
What the runs would have lost and saved by a growing front, each judged by a predictor that learnt from the other
families (points of accuracy, as means; FLOPs of full training without a cache). The thresholds were chosen on all of
these runs, the test runs among them:"""
_NOT_JUDGED = "nothing. This predictor is to be used and not to be judged: no family and no source was kept from it"
_INPUTS = {"gain": "motion, gain and clock", "motion": "motion and clock", "raw": "raw weights"}
_COLUMNS = (
    ("accuracy", "accuracy"),
    ("AUROC", "auroc"),
    ("AP\nfreezable", "precision_freezable"),
    ("AP\nnot yet", "precision_not_yet"),
    ("Brier", "brier"),
    ("calibration\nerror", "calibration_error"),
    ("found", "found"),
    ("wrongly\nfrozen", "wrongly_frozen"),
    ("false\nfreezes", "false_freezes"),
)
_COMPARED = (("AUROC", "auroc"), ("AP not yet", "precision_not_yet"), ("false freezes", "false_freezes"))
_RIVALS = ("clock", "hand-made", "attention")
_UNSEEN = (
    ("AUROC", "auroc"),
    ("AP not yet", "precision_not_yet"),
    ("calibration error", "calibration_error"),
    ("found", "found"),
    ("false freezes", "false_freezes"),
    ("false freezes at half", "false_freezes_at_half"),
)


def training_data(windows: WindowSet, parts: dict[str, Sequence[int]], files: Sequence[str]) -> dict[str, Any]:
    """What a predictor was trained and tested on; `parts` names the places of the runs in train, validation, test."""
    families = {
        family: {part: sum(windows.runs[place].family == family for place in places) for part, places in parts.items()}
        for family in sorted({run.family for run in windows.runs})
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
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "smartfrz": predictor.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(file: PredictorFile) -> str:
    """A predictor as text, from its file alone. What the card lacks is n/a; control characters are left out."""
    config, spec = asdict(file.model.config), file.spec
    inputs = _INPUTS[config["inputs"]]
    parameters = sum(parameter.numel() for parameter in file.model.parameters())
    rows = [
        ("input", f"{inputs}: the last {config['window']} snapshots of {config['weights']} weights of a layer"),
        ("network", f"{parameters:,} parameters; hidden {config['hidden']}, key {config['key']}"),
        ("sampling", f"{spec.weights} weights a layer, {spec.snapshots} snapshots a training, seed {spec.seed}"),
        ("threshold", f"freezes from probability {file.threshold:.4f}{why(file.card)}{_weighed(file)}"),
        *_told(file.card),
    ]
    lines = [f"{name:<11} {told}" for name, told in rows]
    return "\n".join(["freeze predictor", *lines, "", figures_text(file.card)])


def figures_text(card: Any) -> str:
    """The tables of a card: test figures by judge, by family, without each family, and on what was held out."""
    parts = [_overall(card), _by_family(card), _transfer(card), _unseen(card), _LEGEND, _risks(card)]
    return "\n\n".join(part for part in parts if part)


def held_out_text(held_out: Any) -> str:
    """The families and sources that a card says were held out, in words."""
    names = {kind: _listed(at(held_out, kind)) for kind in ("families", "sources")}
    if not any(names.values()):
        return _NOT_JUDGED
    return "; ".join(f"{kind} {', '.join(listed)}" for kind, listed in names.items() if listed)


def _told(card: Any) -> list[tuple[str, str]]:
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
        # Cards from before there was such a split say nothing of it.
        *([("held out", held_out_text(held_out))] if isinstance(held_out, dict) else []),
        ("made", f"{text(at(made, 'made'))} with {versions}"),
    ]


def _rule(labels: Any) -> str:
    if (tolerance := at(labels, "tolerance")) is not None:
        return f"may be frozen where freezing the front up to it costs at most {text(tolerance)} points of accuracy"
    threshold, dip, learn = (at(labels, name) for name in ("label_threshold", "label_dip", "learn_threshold"))
    told = f"may be frozen once its CKA to the final network stays at least {text(threshold)}"
    told += f", dips of {text(dip)} allowed" if dip else ""
    return told + (f"; learnt from labels of {text(learn)}" if learn else "")


def why(card: Any) -> str:
    """What the threshold of a predictor with this card was chosen for, in words."""
    if at(card, "risks") is not None:
        return f", for a risk of {DEFAULT_RISK:g} points"
    allowed = at(card, "training", "false_freeze")
    return "" if allowed is None else f", the lowest with at most {percent(allowed)} false freezes on validation runs"


def _weighed(file: PredictorFile) -> str:
    return "; that is for all layers: a front has to be the surer the less it saves" if file.weighs else ""


def _overall(card: Any) -> str:
    overall = at(card, "test", "overall")
    if not isinstance(overall, dict):
        return "No held-out figures in this file."
    figures = at(overall, "attention")
    head = (
        f"Held-out runs, of families it knows: {text(at(figures, 'windows'))} windows, "
        f"{percent(at(figures, 'freezable'))} freezable"
    )
    return f"{head}\n{_by_judge(overall, _COLUMNS)}"


def _risks(card: Any) -> str:
    rows = at(card, "risks")
    if not isinstance(rows, list):
        return ""
    head = ("risk", "freezes from", "points lost", "FLOPs", "points elsewhere", "FLOPs elsewhere")
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
    # Cards from before test runs were left out say nothing of it.
    among = "without those" if at(card, "calibration", "on_test_runs") is False else "with those"
    line = f"calibrated on the same judgements, {among} of test runs: "
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
    heads = [title if place == 0 else "" for title, _ in _COMPARED for place in range(len(_RIVALS))]
    titles = ["left out", *(f"{head}\n{rival}" for head, rival in zip(heads, _RIVALS * len(_COMPARED), strict=True))]
    lines = ["Families never seen: trained on all others, tested on the held-out runs of this one"]
    lines += [table(titles, rows)] if families else []
    return "\n".join(lines + (["not tested:", *left_out] if left_out else []))


def _unseen(card: Any) -> str:
    """What is told of the families and sources that were held out; nothing where the card knows of none."""
    held_out, found = at(card, "held_out"), at(card, "unseen")
    if not isinstance(held_out, dict):
        return ""
    told = held_out_text(held_out)
    if told == _NOT_JUDGED:
        return f"Held out: {told}."
    overall, groups = at(found, "overall"), at(found, "groups")
    if not isinstance(overall, dict) or not isinstance(groups, list):
        return f"Held out: {told}.\nNo run of them was there: gather some, and train again, to see how it does on them."
    figures = at(overall, "attention")
    head = (
        "Held out from all training and tuning, by family or by source: "
        f"{text(at(found, 'runs'))} runs in {len(groups)} groups, {text(at(figures, 'windows'))} windows, "
        f"{percent(at(figures, 'freezable'))} freezable"
    )
    columns = [(title.replace(" ", "\n", 1), key) for title, key in _UNSEEN]
    tables = [_by_group(title, key, overall, groups, at(found, "mean")) for title, key in _UNSEEN]
    return "\n\n".join([f"{head}\n{_by_judge(overall, columns)}\n{_AT_HALF}", _group_counts(groups), *tables])


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
    """One figure of every judge, by family and source."""
    judges = _judges_in(overall)
    named = [(_group_name(group), at(group, "judges")) for group in groups[:_MOST_GROUPS]]
    rows = [[name, *(figure(at(row, judge, key)) for judge in judges)] for name, row in [*named, ("mean", mean)]]
    return table([title, *(judge.replace(" ", "\n") for judge in judges)], rows)


def _by_judge(overall: dict[str, Any], columns: Sequence[tuple[str, str]]) -> str:
    rows = [[name, *(figure(at(overall, name, key)) for _, key in columns)] for name in _judges_in(overall)]
    return table(["", *(title for title, _ in columns)], rows)


def _judges_in(overall: dict[str, Any]) -> list[str]:
    """The judges that a card has figures of: older ones have fewer."""
    return [name for name in JUDGES if name in overall]


def _group_name(group: Any) -> str:
    return f"{text(at(group, 'family'))[:20]} on {text(at(group, 'source'))[:20]}"


def _compared(row: Any) -> list[str]:
    return [figure(at(row, rival, key)) for _, key in _COMPARED for rival in _RIVALS]


def _listed(names: Any) -> list[str]:
    return [text(name)[:40] for name in names[:_MOST_ROWS]] if isinstance(names, list | tuple) else []


def _rows(content: Any) -> list[tuple[str, Any]]:
    return list(content.items())[:_MOST_ROWS] if isinstance(content, dict) else []

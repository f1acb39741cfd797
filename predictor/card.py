"""A predictor's card: what it was trained on and how well it does, as JSON in its file and as text in the terminal."""

import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import predictor
from predictor.attention import PredictorFile
from predictor.heldout import JUDGES
from predictor.windows import WindowSet

_MOST_ROWS = 100
_LEGEND = """\
AUROC, AP: chance to rank a freezable window above one that is not, and average precision; .5 and the class's share
by guessing. AP not yet: of finding the windows that may not be frozen yet, the harder class.
found: share of freezable windows frozen at the threshold. wrongly frozen: share of not-yet-freezable ones frozen.
false freezes: share of all its freezes that are wrong. n/a: the windows hold one class only, or nothing is frozen."""
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
_RIVALS = JUDGES[1:]


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
    inputs = "motion and signals" if config["inputs"] == "motion" else "raw weights"
    parameters = sum(parameter.numel() for parameter in file.model.parameters())
    rows = [
        ("input", f"{inputs}: the last {config['window']} snapshots of {config['weights']} weights of a layer"),
        ("network", f"{parameters:,} parameters; hidden {config['hidden']}, key {config['key']}"),
        ("sampling", f"{spec.weights} weights a layer, {spec.snapshots} snapshots a training, seed {spec.seed}"),
        ("threshold", f"freezes from probability {file.threshold:.4f}{_why(file.card)}"),
        *_told(file.card),
    ]
    lines = [f"{name:<11} {text}" for name, text in rows]
    return "\n".join(["freeze predictor", *lines, "", figures_text(file.card)])


def figures_text(card: Any) -> str:
    """The tables of a card: held-out figures by judge, by family, and for families never seen."""
    parts = [_overall(card), _by_family(card), _transfer(card), _LEGEND]
    return "\n\n".join(part for part in parts if part)


def _told(card: Any) -> list[tuple[str, str]]:
    data, made = _at(card, "data"), _at(card, "provenance")
    families = ", ".join(f"{_text(name)} {_text(_at(row, 'train'))}" for name, row in _rows(_at(data, "families")))
    epochs = f"epoch {_text(_at(card, 'training', 'best_epoch'))} of {_text(_at(card, 'training', 'epochs'))} kept"
    versions = ", ".join(f"{name} {_text(_at(made, name))}" for name in ("smartfrz", "torch", "python"))
    runs = f"{_text(_at(data, 'runs'))} runs, {_text(_at(data, 'windows'))} windows"
    sources = ", ".join(_text(name) for name, _ in _rows(_at(data, "sources")))
    return [
        ("labels", _rule(_at(card, "labels"))),
        ("data", f"{runs}, {_percent(_at(data, 'freezable'))} freezable; networks trained on {sources or 'n/a'}"),
        ("trained on", f"runs by family: {families or 'n/a'}; {epochs}"),
        ("made", f"{_text(_at(made, 'made'))} with {versions}"),
    ]


def _rule(labels: Any) -> str:
    threshold, dip, learn = (_at(labels, name) for name in ("label_threshold", "label_dip", "learn_threshold"))
    text = f"may be frozen once its CKA to the final network stays at least {_text(threshold)}"
    text += f", dips of {_text(dip)} allowed" if dip else ""
    return text + (f"; learnt from labels of {_text(learn)}" if learn else "")


def _why(card: Any) -> str:
    allowed = _at(card, "training", "false_freeze")
    return "" if allowed is None else f", the lowest with at most {_percent(allowed)} false freezes on validation runs"


def _overall(card: Any) -> str:
    overall = _at(card, "test", "overall")
    if not isinstance(overall, dict):
        return "No held-out figures in this file."
    figures = _at(overall, "attention")
    head = (
        f"Held-out runs, of families it knows: {_text(_at(figures, 'windows'))} windows, "
        f"{_percent(_at(figures, 'freezable'))} freezable"
    )
    rows = [[name, *(_figure(_at(overall, name, key)) for _, key in _COLUMNS)] for name in JUDGES]
    return head + "\n" + table(["", *(title for title, _ in _COLUMNS)], rows)


def _by_family(card: Any) -> str:
    families = _rows(_at(card, "test", "families"))
    if not families:
        return ""
    rows = [
        [
            _text(family),
            _text(_at(row, "attention", "windows")),
            _percent(_at(row, "attention", "freezable")),
            *(_figure(_at(row, "attention", key)) for _, key in _COLUMNS),
        ]
        for family, row in families
    ]
    titles = ["family", "windows", "freezable", *(title for title, _ in _COLUMNS)]
    return "The predictor, by family\n" + table(titles, rows)


def _transfer(card: Any) -> str:
    families = _rows(_at(card, "transfer", "families"))
    left_out = [f"  {_text(name)}: {_text(why)}" for name, why in _rows(_at(card, "transfer", "left_out"))]
    if not families and not left_out:
        return ""
    rows = [[_text(name), *_compared(row)] for name, row in [*families, ("mean", _at(card, "transfer", "mean"))]]
    # The figure's name stands over the first of its columns.
    heads = [title if place == 0 else "" for title, _ in _COMPARED for place in range(len(_RIVALS))]
    titles = ["left out", *(f"{head}\n{rival}" for head, rival in zip(heads, _RIVALS * len(_COMPARED), strict=True))]
    lines = ["Families never seen: trained on all others, tested on the held-out runs of this one"]
    lines += [table(titles, rows)] if families else []
    return "\n".join(lines + (["not tested:", *left_out] if left_out else []))


def _compared(row: Any) -> list[str]:
    return [_figure(_at(row, rival, key)) for _, key in _COMPARED for rival in _RIVALS]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be, the first to the left; a title may have several lines."""
    words = [title.split("\n") for title in titles]
    height = max(len(parts) for parts in words)
    heads = [[""] * (height - len(parts)) + parts for parts in words]
    grid = [[head[line] for head in heads] for line in range(height)] + [list(row) for row in rows]
    widths = [max(len(row[column]) for row in grid) for column in range(len(titles))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in grid)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _at(content: Any, *path: str) -> Any:
    """What lies at a path of keys; None where nothing does. A file's card may hold anything."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _rows(content: Any) -> list[tuple[str, Any]]:
    return list(content.items())[:_MOST_ROWS] if isinstance(content, dict) else []


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if usable and math.isfinite(value) else None


def _figure(value: Any) -> str:
    number = _number(value)
    return "n/a" if number is None else f"{number:.3f}"


def _percent(value: Any) -> str:
    number = _number(value)
    return "n/a" if number is None else f"{100 * number:.1f} %"


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 1e15 else "n/a"
    return "".join(letter for letter in str(value)[:200] if letter.isprintable())

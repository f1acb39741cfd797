"""How good predicted probabilities are, how a threshold is chosen, and how false freezes are counted.

A window is *freezable* when its label says so, and *not yet* freezable otherwise. It is frozen when its probability is
at least the threshold. A *false freeze* freezes a window that is not yet freezable. There are two rates of them:
`wrongly_frozen` is their share in the windows that are not yet freezable, and `false_freezes` their share in all
freezes. A figure that the data cannot give, because there is one class only or no freeze at all, is None.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Figures = dict[str, Any]
_BINS = 10


def figures_of(labels_N: Bools, probability_N: Floats, threshold: float) -> Figures:
    """The figures of one classifier on some windows. Accuracy is at probability 0.5, rates are at the threshold."""
    if not len(labels_N):
        return {"windows": 0}
    return {
        "windows": len(labels_N),
        "freezable": float(labels_N.mean()),
        "accuracy": float(((probability_N >= 0.5) == labels_N).mean()),
        "auroc": auroc(labels_N, probability_N),
        "precision_freezable": average_precision(labels_N, probability_N),
        "precision_not_yet": average_precision(~labels_N, 1 - probability_N),
        "brier": float(np.square(probability_N - labels_N).mean()),
        "calibration_error": calibration_error(calibration(labels_N, probability_N)),
        **freezes_at(labels_N, probability_N, threshold),
        "false_freezes_at_half": false_freezes_at_half(labels_N, probability_N),
    }


def freezes_at(labels_N: Bools, probability_N: Floats, threshold: float) -> Figures:
    """`found` (share of freezable windows that are frozen), `wrongly_frozen`, `false_freezes` and the threshold."""
    frozen_N = probability_N >= threshold
    return {
        "threshold": threshold,
        "found": _share(frozen_N[labels_N]),
        "wrongly_frozen": _share(frozen_N[~labels_N]),
        "false_freezes": _share(~labels_N[frozen_N]),
    }


def choose_threshold(labels_N: Bools, probability_N: Floats, false_freeze: float) -> float:
    """The lowest of the probabilities at which at most the share `false_freeze` of all freezes is false.

    1.0 if there is none: then only certainty freezes.
    """
    order = np.argsort(-probability_N, kind="stable")
    probability_N, false_N = probability_N[order], ~labels_N[order]
    share_N = np.cumsum(false_N) / np.arange(1, len(order) + 1)
    # Equal probabilities freeze together, so that only the last of them can be a threshold.
    last_N = np.append(probability_N[:-1] > probability_N[1:], True)
    allowed = np.flatnonzero(last_N & (share_N <= false_freeze))
    return float(probability_N[allowed[-1]]) if len(allowed) else 1.0


def false_freezes_at_half(labels_N: Bools, probability_N: Floats) -> float | None:
    """The share of false freezes at the threshold that freezes half of all freezable windows. None for one class only.

    The threshold is the highest of these windows' own probabilities that freezes so many. So this figure measures the
    ranking, and not a threshold that was chosen on other windows. Equal probabilities are frozen together.
    """
    if labels_N.all() or not labels_N.any():
        return None
    freezable_N = np.sort(probability_N[labels_N])[::-1]
    return _share(~labels_N[probability_N >= freezable_N[(len(freezable_N) - 1) // 2]])


def auroc(labels_N: Bools, probability_N: Floats) -> float | None:
    """The area under the ROC curve. None for one class only."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels_N, probability_N)) if labels_N.any() and not labels_N.all() else None


def average_precision(labels_N: Bools, score_N: Floats) -> float | None:
    """The average precision of finding the windows that are True. None for one class only."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels_N, score_N)) if labels_N.any() and not labels_N.all() else None


def calibration(labels_N: Bools, probability_N: Floats) -> list[dict[str, float]]:
    """Ten equal bins of probability without the empty ones: mean probability, share freezable, windows."""
    from sklearn.calibration import calibration_curve

    observed, predicted = calibration_curve(labels_N.astype(int), probability_N, pos_label=1, n_bins=_BINS)
    edges = np.linspace(0, 1, _BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], probability_N), minlength=_BINS)
    rows = zip(predicted, observed, counts[counts > 0], strict=True)
    return [{"predicted": float(p), "observed": float(o), "windows": int(n)} for p, o, n in rows]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """The expected calibration error: |predicted - observed|, averaged over the bins by their windows."""
    total = sum(row["windows"] for row in bins)
    return sum(row["windows"] * abs(row["predicted"] - row["observed"]) for row in bins) / total


def mean_figures(rows: list[Figures]) -> Figures:
    """The plain mean of each figure over the rows that have it. None if no row has it."""
    names = [name for name in (rows[0] if rows else {}) if name != "windows"]
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return {"windows": sum(row["windows"] for row in rows), **means}


def _share(flags_N: Bools) -> float | None:
    return float(flags_N.mean()) if len(flags_N) else None

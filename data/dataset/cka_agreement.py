"""How well labels from CKA predict what freezing did: they are a proxy for its accuracy cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.dataset.windows import trajectories_in
from data.outcomes.records import Outcome
from data.trajectories.labels import LabelRule
from data.trajectories.trajectory import Trajectory
from predictor.errors import UsageError
from predictor.training.card import figure, table
from predictor.training.metrics import auroc

THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""The CKA thresholds of the label rules that are compared."""
_BELOW_ALL = -1.0
_AGAIN = "its outcomes: gather both anew, with the same version"


@dataclass(frozen=True, eq=False)
class Labelled:
    """An outcome of freezing, and the run's similarity for the layers that were frozen."""

    outcome: Outcome
    similarity_TL: npt.NDArray[np.float32]
    """CKA of those layers to the final network, from the last snapshot that was taken by the outcome's step to the end.
    """

    def freezable(self, rule: LabelRule) -> tuple[bool, ...]:
        """Whether each of the outcome's layers may be frozen at its step, by a rule."""
        # A label depends on later snapshots alone, so that it is the same on the rest of the run.
        return tuple(bool(label) for label in rule.labels(self.similarity_TL)[0])

    @property
    def lowest(self) -> float:
        """The lowest CKA from the step on: without a dip, the highest threshold at which all layers are freezable.

        -1 if a layer has no CKA at the step.
        """
        if np.isnan(self.similarity_TL[0]).any():
            return _BELOW_ALL
        return float(np.nanmin(self.similarity_TL))


def join(outcomes: Iterable[Outcome], sources: Path | str | Iterable[Path | str | Trajectory]) -> list[Labelled]:
    """Each frozen prefix and single layer of `outcomes` with the similarity of its layers, for runs in `sources`.

    `sources` are trajectory files, gather folders or trajectories. Runs that diverged there have no labels, and are
    left out. Raises UsageError if a run's steps or layers differ between the two.
    """
    by_run: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.layers:
            by_run.setdefault(outcome.run_id, []).append(outcome)
    return [
        _labelled(outcome, trajectory)
        for trajectory in trajectories_in(sources)
        if trajectory.finished
        for outcome in by_run.pop(trajectory.run_id, [])
    ]


def noise_of(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """The noise of each run's final loss, by the run's id: the RMS of `extra_loss` over its noise outcomes."""
    extra: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.kind == "noise" and outcome.result.status == "finished":
            extra.setdefault(outcome.run_id, []).append(outcome.extra_loss)
    return {run_id: float(np.sqrt(np.mean(np.square(values)))) for run_id, values in extra.items()}


def harmless(outcome: Outcome, noise: Mapping[str, float], times: float = 1.0) -> bool:
    """Whether the final loss is above the unfrozen run's by at most so many times that run's noise."""
    return outcome.extra_loss <= times * noise[outcome.run_id]


def describe_outcomes(
    outcomes: Sequence[Outcome], sources: Sequence[Path | str | Trajectory] = (), times: float = 1.0
) -> str:
    """What freezing did, in tables. With trajectories of the same runs, how well their labels predict it.

    Args:
        outcomes: of any number of runs.
        sources: trajectory files, gather folders or trajectories.
        times: how many times a run's noise its loss may rise by and still be called harmless.

    Raises:
        UsageError: if no run has both frozen layers and noise to compare with.
    """
    if not times >= 0:
        raise UsageError(f"times={times}: give how many times the noise a loss may rise by, from 0")
    noise = noise_of(outcomes)
    frozen = [outcome for outcome in outcomes if outcome.layers and outcome.run_id in noise]
    if not frozen:
        raise UsageError("no run has both layers frozen and noise to compare with: gather outcomes of other runs")
    parts = [_head(outcomes, frozen, noise, times), _by_progress(frozen, noise, times)]
    if sources:
        joined = join(frozen, sources)
        parts.append(_label_head(joined, frozen))
        for kind in ("front", "single"):
            some = [labelled for labelled in joined if labelled.outcome.kind == kind]
            if some:
                parts.append(_by_rule(kind, some, noise, times))
    return "\n\n".join(parts) + "\n"


def _labelled(outcome: Outcome, trajectory: Trajectory) -> Labelled:
    total = trajectory.config["total_steps"]
    if total != outcome.total_steps:
        raise UsageError(f"run {outcome.run_id}: {total} steps in its trajectory and {outcome.total_steps} in {_AGAIN}")
    for index, name in zip(outcome.layers, outcome.layer_names, strict=True):
        theirs = dict(enumerate(trajectory.layer_names)).get(index)
        if theirs != name:
            raise UsageError(
                f"run {outcome.run_id}: layer {index} is {theirs!r} in its trajectory, {name!r} in {_AGAIN}"
            )
    row = int(np.searchsorted(trajectory.step_T, outcome.step, side="right")) - 1
    return Labelled(outcome, trajectory.similarity_TL[row:, list(outcome.layers)])


def _head(outcomes: Sequence[Outcome], frozen: list[Outcome], noise: Mapping[str, float], times: float) -> str:
    runs = {outcome.run_id: outcome.unfrozen for outcome in outcomes}
    lost = sum(run.status == "diverged" for run in runs.values())
    diverged = sum(outcome.result.status == "diverged" for outcome in frozen)
    shares = [noise[run_id] / run.final_loss for run_id, run in runs.items() if run_id in noise and run.final_loss]
    typical = f"{np.median(shares):.1%}" if shares else "n/a"
    return (
        f"{len(runs)} runs, {lost} of them diverged; {len(frozen)} continuations with frozen layers, {diverged} of "
        f"them diverged\nharmless: the final test loss is above the unfrozen run's by at most {times:g} times the "
        f"noise, which is the effect of another order of the samples: {typical} of the loss, in the median run"
    )


def _by_progress(frozen: list[Outcome], noise: Mapping[str, float], times: float) -> str:
    """The share of continuations that were harmless, by what was frozen and from when."""
    times_of = sorted({_nearest(outcome.progress) for outcome in frozen})
    groups: dict[str, dict[float, list[bool]]] = {}
    for outcome in sorted(frozen, key=lambda outcome: (outcome.kind, len(outcome.layers) / outcome.layer_count)):
        cells = groups.setdefault(_what(outcome), {})
        cells.setdefault(_nearest(outcome.progress), []).append(harmless(outcome, noise, times))
    rows = [("harmless, frozen from progress", *(f"{progress:.2f}" for progress in times_of))]
    rows += [(what, *(_share(cells.get(progress, [])) for progress in times_of)) for what, cells in groups.items()]
    return table(rows[0], rows[1:])


def _label_head(joined: list[Labelled], frozen: list[Outcome]) -> str:
    missing = {outcome.run_id for outcome in frozen} - {labelled.outcome.run_id for labelled in joined}
    if not joined:
        raise UsageError(
            "none of these runs is among the trajectories: gather both from the same suite, with one version"
        )
    left_out = f"; {len(missing)} runs have no trajectory there, and are left out" if missing else ""
    return (
        f"how well labels from CKA predict it: {len(joined)} continuations{left_out}\nlabelled: the rule lets all "
        "layers freeze that were frozen; a false label: labelled, and not harmless; missed: harmless, and not labelled"
    )


def _by_rule(kind: str, some: list[Labelled], noise: Mapping[str, float], times: float) -> str:
    harmless_N = np.array([harmless(labelled.outcome, noise, times) for labelled in some])
    title = {"front": "prefixes", "single": "singles"}[kind]
    rows = [(f"{title}: {len(some)}, {harmless_N.mean():.0%} harmless", "labelled", "false labels", "missed", "AUROC")]
    for threshold in THRESHOLDS:
        rule = LabelRule(threshold)
        label_N = np.array([all(labelled.freezable(rule)) for labelled in some])
        false, missed = int((label_N & ~harmless_N).sum()), int((~label_N & harmless_N).sum())
        counts = (str(int(label_N.sum())), str(false), str(missed))
        rows.append((f"CKA at least {threshold}", *counts, _auroc(harmless_N, label_N)))
    others: dict[str, Callable[[Labelled], float]] = {
        "the lowest CKA itself": lambda labelled: labelled.lowest,
        "progress alone": lambda labelled: labelled.outcome.progress,
    }
    for name, score in others.items():
        rows.append((name, "", "", "", _auroc(harmless_N, np.array([score(labelled) for labelled in some]))))
    return table(rows[0], rows[1:])


def _auroc(harmless_N: npt.NDArray[np.bool_], score_N: npt.NDArray[np.generic]) -> str:
    return figure(auroc(harmless_N, score_N.astype(np.float64)))


def _what(outcome: Outcome) -> str:
    """Prefixes by the nearest quarter of the layers."""
    if outcome.kind == "single":
        return "a single layer"
    quarters = round(4 * len(outcome.layers) / outcome.layer_count)
    if quarters == 0:
        return "a smaller prefix"
    return "all layers" if quarters == 4 else f"a prefix of about {quarters}/4"


def _nearest(progress: float) -> float:
    """Rounded to 0.05, so that runs with different numbers of steps share a column."""
    return round(progress * 20) / 20


def _share(flags: list[bool]) -> str:
    return f"{sum(flags)}/{len(flags)}" if flags else "n/a"

"""From trajectory files to the windows that a predictor is trained on, and to those that it is judged on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from data.outcomes.accuracy_cost import AccuracyCost
from data.trajectories.folder import trajectory_files
from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from predictor.errors import UsageError, unknown
from predictor.model.features import recorded_signals
from predictor.model.sampling import SampleSpec
from predictor.training.splits import HeldOut, read_held_out
from predictor.training.windows import RunWindows, WindowSet

Sources = Path | str | Iterable[Path | str | Trajectory]
Part = Literal["learning", "held-out"]
SHIPPED_SPLIT = Path(__file__).parent / "held_out.toml"
"""The families and sources that are held out unless somebody says otherwise."""


@dataclass(frozen=True, eq=False)
class OutcomeRule:
    """A layer may be frozen where freezing the front up to it, from there to the end, costs little accuracy.

    That has been measured, by `python -m collect gather outcomes`. Runs of which it is not known are left out.
    """

    harms: Mapping[str, AccuracyCost]
    """What freezing does to each run, by the run's id."""
    tolerance: float = 0.5
    """Percentage points of accuracy that it may cost."""


Rule = LabelRule | OutcomeRule
"""What makes a window freezable."""


def windows_from(sources: Sources, window: int, rule: Rule | None = None, held_out: HeldOut | None = None) -> WindowSet:
    """The windows to learn from: those of `part_of` the runs that are not held out.

    Raises UsageError as that does, and when nothing is left.
    """
    windows = part_of("learning", sources, window, rule, held_out)
    if not windows.runs and isinstance(rule, OutcomeRule):
        raise UsageError(
            f"none of these runs has both {window} snapshots and outcomes, those that are held out left aside: gather "
            "trajectories and outcomes of the same suite"
        )
    if not windows.runs:
        raise UsageError(
            f"no finished run has {window} snapshots with a similarity, those that are held out left aside: gather "
            "more, take a smaller window, or hold less out with --held-out"
        )
    return windows


def part_of(
    part: Part, sources: Sources, window: int, rule: Rule | None = None, held_out: HeldOut | None = None
) -> WindowSet:
    """The windows of one part of the runs of trajectory files, gather folders or trajectories, labelled by `rule`.

    part: "learning" for the runs of families and sources that are not held out, "held-out" for the others, which are
        there for a trained predictor to be judged on and for nothing else.
    held_out: which those are; by default what data/dataset/held_out.toml names.

    Runs are read one by one; what stays in memory are the weights of the part's own. Runs that diverged have no final
    network and are left out, and so is, run by run, a layer whose similarity is missing at any snapshot. The set may be
    empty.

    Raises UsageError when runs were sampled differently, whatever their part, and when a run comes twice: it would be
    on both sides of a split.
    """
    if part not in get_args(Part):
        raise unknown("part", part, get_args(Part))
    rule = rule or LabelRule()
    held_out = read_held_out(SHIPPED_SPLIT) if held_out is None else held_out
    runs: list[RunWindows] = []
    seen: set[str] = set()
    specs: dict[SampleSpec, str] = {}
    for trajectory in trajectories_in(sources):
        if trajectory.run_id in seen:
            raise UsageError(f"run {trajectory.run_id}: comes twice: name each file once, or merge them")
        seen.add(trajectory.run_id)
        specs.setdefault(spec_of(trajectory), trajectory.run_id)
        if len(specs) > 1:
            one, other = specs
            raise UsageError(
                f"runs {specs[one]} and {specs[other]} were sampled differently ({one}, {other}): take one kind"
            )
        held = held_out.holds(trajectory.config["family"], trajectory.config["source"])
        if held == (part == "held-out") and trajectory.finished and len(trajectory.step_T) >= window:
            run = _by_outcomes(trajectory, rule) if isinstance(rule, OutcomeRule) else _by_similarity(trajectory, rule)
            runs.extend([run] if run else [])
    return WindowSet(tuple(run for run in runs if run.labels_TL.numel()), window)


def trajectories_in(sources: Sources) -> Iterator[Trajectory]:
    """The trajectories of files, gather folders or trajectories, one at a time."""
    for source in [sources] if isinstance(sources, Path | str) else sources:
        if isinstance(source, Trajectory):
            yield source
            continue
        for path in trajectory_files([Path(source)]):
            with open_trajectories(path) as file:
                yield from file


def spec_of(trajectory: Trajectory) -> SampleSpec:
    """How a run was sampled; a predictor that is trained on it must be used with the same.

    Raises UsageError for a run that cannot have been sampled so.
    """
    try:
        return SampleSpec(**{name: trajectory.config["sampling"][name] for name in ("weights", "snapshots", "seed")})
    except UsageError as error:
        raise UsageError(f"run {trajectory.run_id}: its sampling is none ({error}): leave it out") from error


def _by_similarity(trajectory: Trajectory, rule: LabelRule) -> RunWindows:
    known_L = np.flatnonzero(~np.isnan(trajectory.similarity_TL).any(axis=0))
    run = _unlabelled(trajectory)
    return replace(
        run,
        weights_TLK=run.weights_TLK[:, known_L],
        signals_TLS=run.signals_TLS[:, known_L],
        labels_TL=torch.from_numpy(rule.labels(trajectory.similarity_TL[:, known_L])),
    )


def _by_outcomes(trajectory: Trajectory, rule: OutcomeRule) -> RunWindows | None:
    """None where nothing is known of what freezing does to this run."""
    harm = rule.harms.get(trajectory.run_id)
    if harm is None:
        return None
    if (harm.total_steps, harm.layer_count) != (trajectory.config["total_steps"], len(trajectory.layer_names)):
        raise UsageError(
            f"run {trajectory.run_id}: its outcomes are of a training of {harm.total_steps} steps and "
            f"{harm.layer_count} layers, its trajectory is not: gather both anew, with the same version"
        )
    harm_TL = torch.from_numpy(harm.cost(trajectory.step_T))
    labels_TL = harm_TL <= rule.tolerance
    return replace(
        _unlabelled(trajectory), labels_TL=labels_TL, harm_TL=harm_TL, flops_F=torch.from_numpy(harm.flops())
    )


def _unlabelled(trajectory: Trajectory) -> RunWindows:
    weights_TLK = torch.from_numpy(trajectory.weights_TLK)
    signals_TLS = recorded_signals(
        weights_TLK,
        torch.from_numpy(trajectory.gradient_norm_TL),
        torch.from_numpy(trajectory.step_T),
        torch.from_numpy(trajectory.lr_T),
        torch.from_numpy(trajectory.layer_sizes_L),
        trajectory.config["total_steps"],
    )
    return RunWindows(
        run_id=trajectory.run_id,
        family=trajectory.config["family"],
        source=trajectory.config["source"],
        weights_TLK=weights_TLK,
        signals_TLS=signals_TLS,
        labels_TL=torch.zeros(weights_TLK.shape[:2], dtype=torch.bool),
    )

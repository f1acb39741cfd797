"""From trajectory files to the windows that a predictor is trained on, and to those that it is evaluated on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from data.outcomes.accuracy_cost import AccuracyCost, accuracy_costs
from data.outcomes.records import read_outcomes
from data.trajectories.folder import trajectory_files
from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from data.trajectories.trajectory import Trajectory
from predictor.errors import UsageError, unknown
from predictor.model.sampling import SampleSpec
from predictor.training.dataset import Recording, RunWindows, WindowSet, replay
from predictor.training.splits import HeldOut, read_held_out

Sources = Path | str | Iterable[Path | str | Trajectory]
Part = Literal["learning", "held-out"]
SHIPPED_SPLIT = Path(__file__).parent / "held_out.toml"
"""The families and sources that are held out by default."""


@dataclass(frozen=True, eq=False)
class OutcomeRule:
    """A layer may be frozen if freezing the prefix up to it, from there to the end, costs little accuracy.

    `python -m collect gather outcomes` measures that. Runs without outcomes are left out.
    """

    costs: Mapping[str, AccuracyCost]
    """What freezing costs each run, by the run's id."""
    tolerance: float = 0.5
    """Percentage points of accuracy that it may cost."""

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise UsageError(f"tolerance={self.tolerance}: give percentage points above 0")


Rule = LabelRule | OutcomeRule
"""What makes a window freezable."""


def outcome_rule(paths: Sequence[Path], tolerance: float, held_out: HeldOut) -> OutcomeRule:
    """The rule of outcome files. The ratio of accuracy to loss is taken from the runs that are not held out."""
    outcomes = [outcome for path in paths for outcome in read_outcomes(path)]
    return OutcomeRule(accuracy_costs(outcomes, held_out), tolerance)


def windows_from(sources: Sources, window: int, rule: Rule | None = None, held_out: HeldOut | None = None) -> WindowSet:
    """The windows to train on: those of `part_of` the runs that are not held out.

    Raises UsageError as `part_of` does, and if there are none.
    """
    windows = part_of("learning", sources, window, rule, held_out)
    if not windows.runs and isinstance(rule, OutcomeRule):
        raise UsageError(
            f"no run that is not held out has both {window} snapshots and outcomes: gather trajectories and outcomes "
            "of the same suite"
        )
    if not windows.runs:
        raise UsageError(
            f"no finished run that is not held out has {window} snapshots with a similarity: gather more, take a "
            "smaller window, or hold less out with --held-out"
        )
    return windows


def part_of(
    part: Part, sources: Sources, window: int, rule: Rule | None = None, held_out: HeldOut | None = None
) -> WindowSet:
    """The windows of one part of the runs, labelled by `rule`.

    Runs are read one by one. Only the weights of the part's own runs stay in memory. Runs that diverged have no final
    network and are left out. With labels from CKA so is, run by run, a layer without a similarity at some snapshot. The
    set may be empty.

    Args:
        part: "learning" for the runs of families and sources that are not held out. "held-out" for the others, which
            are for the evaluation of a trained predictor and for nothing else.
        sources: trajectory files, gather folders or trajectories.
        window: snapshots in a window.
        rule: by default labels from CKA.
        held_out: by default what data/dataset/held_out.toml names.

    Raises:
        UsageError: for runs of either part that were sampled differently, and for a run that comes twice: it would be
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
            if run and run.labels_TL.numel() and len(run.newest(window)):
                runs.append(run)
    return WindowSet(tuple(runs), window)


def relabelled(windows: WindowSet, sources: Sources, rule: Rule, held_out: HeldOut) -> WindowSet:
    """The same windows with the labels of another rule. The weights are shared."""
    others = windows_from(sources, windows.window, rule, held_out).runs
    pairs = zip(windows.runs, others, strict=True)
    return replace(windows, runs=tuple(replace(run, labels_TL=other.labels_TL) for run, other in pairs))


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
    """How a run was sampled. A predictor that is trained on it must sample in the same way.

    Raises UsageError for a run whose sampling cannot be.
    """
    try:
        return SampleSpec(**{name: trajectory.config["sampling"][name] for name in ("weights", "snapshots", "seed")})
    except UsageError as error:
        raise UsageError(f"run {trajectory.run_id}: its sampling cannot be ({error}): leave it out") from error


def _by_similarity(trajectory: Trajectory, rule: LabelRule) -> RunWindows:
    known_L = np.flatnonzero(~np.isnan(trajectory.similarity_TL).any(axis=0))
    run, kept = _unlabelled(trajectory, fade_frozen=False)
    return replace(
        run,
        weights_TLK=run.weights_TLK[:, known_L],
        features_TLF=run.features_TLF[:, known_L],
        labels_TL=torch.from_numpy(rule.labels(trajectory.similarity_TL[:, known_L])[kept]),
    )


def _by_outcomes(trajectory: Trajectory, rule: OutcomeRule) -> RunWindows | None:
    """None for a run without outcomes."""
    cost = rule.costs.get(trajectory.run_id)
    if cost is None:
        return None
    if (cost.total_steps, cost.layer_count) != (trajectory.config["total_steps"], len(trajectory.layer_names)):
        raise UsageError(
            f"run {trajectory.run_id}: its outcomes are of a training of {cost.total_steps} steps and "
            f"{cost.layer_count} layers, its trajectory is not: gather both anew, with the same version"
        )
    run, kept = _unlabelled(trajectory, fade_frozen=True)
    cost_TL = torch.from_numpy(cost.cost(trajectory.step_T[kept]))
    return replace(run, labels_TL=cost_TL <= rule.tolerance, cost_TL=cost_TL, flops_F=torch.from_numpy(cost.flops()))


def _unlabelled(trajectory: Trajectory, fade_frozen: bool) -> tuple[RunWindows, list[int]]:
    """The run with labels that are all false, and which of its snapshots it has."""
    recording = recording_of(trajectory)
    replayed = replay(recording, fade_frozen)
    whole = len(replayed.kept) == len(recording.step_T)
    weights_TLK = recording.weights_TLK if whole else recording.weights_TLK[replayed.kept]
    run = RunWindows(
        run_id=trajectory.run_id,
        family=trajectory.config["family"],
        source=trajectory.config["source"],
        weights_TLK=weights_TLK,
        features_TLF=replayed.features_TLF,
        labels_TL=torch.zeros(weights_TLK.shape[:2], dtype=torch.bool),
        length_T=replayed.length_T,
    )
    return run, replayed.kept


def recording_of(trajectory: Trajectory) -> Recording:
    """The part of a trajectory that the predictor sees."""
    return Recording(
        step_T=torch.from_numpy(trajectory.step_T),
        lr_T=torch.from_numpy(trajectory.lr_T),
        weights_TLK=torch.from_numpy(trajectory.weights_TLK),
        gradient_norm_TL=torch.from_numpy(trajectory.gradient_norm_TL),
        size_L=torch.from_numpy(trajectory.layer_sizes_L),
        total_steps=trajectory.config["total_steps"],
    )

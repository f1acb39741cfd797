"""From trajectory files to the windows that a predictor is trained on, and to those that it is judged on."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from data.trajectories.store import trajectory_files
from data.trajectories.trajectory import Trajectory
from predictor.errors import UsageError, unknown
from predictor.sampling import SampleSpec
from predictor.splits import HeldOut, read_held_out
from predictor.windows import RunWindows, WindowSet, signals_of

Sources = Path | str | Iterable[Path | str | Trajectory]
Part = Literal["learning", "held-out"]
SHIPPED_SPLIT = Path(__file__).parents[1] / "held_out.toml"
"""The families and sources that are held out unless somebody says otherwise."""


def windows_from(
    sources: Sources, window: int, rule: LabelRule | None = None, held_out: HeldOut | None = None
) -> WindowSet:
    """The windows to learn from: those of `part_of` the runs that are not held out.

    Raises UsageError as that does, and when nothing is left.
    """
    windows = part_of("learning", sources, window, rule, held_out)
    if not windows.runs:
        raise UsageError(
            f"no finished run has {window} snapshots with a similarity, those that are held out left aside: gather "
            "more, take a smaller window, or hold less out with --held-out"
        )
    return windows


def part_of(
    part: Part, sources: Sources, window: int, rule: LabelRule | None = None, held_out: HeldOut | None = None
) -> WindowSet:
    """The windows of one part of the runs of trajectory files, gather folders or trajectories, labelled by `rule`.

    part: "learning" for the runs of families and sources that are not held out, "held-out" for the others, which are
        there for a trained predictor to be judged on and for nothing else.
    held_out: which those are; by default what data/held_out.toml names.

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
            runs.append(_run_windows(trajectory, rule))
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
    """How a run was sampled; a predictor that is trained on it must be used with the same."""
    return SampleSpec(**{name: trajectory.config["sampling"][name] for name in ("weights", "snapshots", "seed")})


def _run_windows(trajectory: Trajectory, rule: LabelRule) -> RunWindows:
    known_L = np.flatnonzero(~np.isnan(trajectory.similarity_TL).any(axis=0))
    signals_TLS = signals_of(
        torch.from_numpy(trajectory.step_T),
        torch.from_numpy(trajectory.lr_T),
        trajectory.config["total_steps"],
        len(trajectory.layer_names),
    )
    return RunWindows(
        run_id=trajectory.run_id,
        family=trajectory.config["family"],
        source=trajectory.config["source"],
        weights_TLK=torch.from_numpy(trajectory.weights_TLK[:, known_L]),
        signals_TLS=signals_TLS[:, known_L],
        labels_TL=torch.from_numpy(rule.labels(trajectory.similarity_TL[:, known_L])),
    )

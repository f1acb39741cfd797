"""From trajectory files to the windows that a predictor is trained on."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from data.trajectories.labels import LabelRule
from data.trajectories.reader import open_trajectories
from data.trajectories.store import trajectory_files
from data.trajectories.trajectory import Trajectory
from predictor.errors import UsageError
from predictor.sampling import SampleSpec
from predictor.windows import RunWindows, WindowSet, signals_of


def windows_from(
    sources: Path | str | Iterable[Path | str | Trajectory], window: int, rule: LabelRule | None = None
) -> WindowSet:
    """The windows of all finished runs of trajectory files, gather folders or trajectories, labelled by `rule`.

    Runs are read one by one; what stays in memory are their weights. Runs that diverged have no final network and are
    left out, and so is, run by run, a layer whose similarity is missing at any snapshot.

    Raises UsageError when runs were sampled differently, when a run comes twice (it would be on both sides of a split),
    and when nothing is left.
    """
    rule = rule or LabelRule()
    runs: dict[str, RunWindows] = {}
    specs: dict[SampleSpec, str] = {}
    for trajectory in trajectories_in(sources):
        if trajectory.run_id in runs:
            raise UsageError(f"run {trajectory.run_id}: comes twice: name each file once, or merge them")
        specs.setdefault(spec_of(trajectory), trajectory.run_id)
        if len(specs) > 1:
            one, other = specs
            raise UsageError(
                f"runs {specs[one]} and {specs[other]} were sampled differently ({one}, {other}): take one kind"
            )
        if trajectory.finished and len(trajectory.step_T) >= window:
            runs[trajectory.run_id] = _run_windows(trajectory, rule)
    usable = tuple(run for run in runs.values() if run.labels_TL.numel())
    if not usable:
        raise UsageError(
            f"no finished run has {window} snapshots with a similarity: gather more, or take a smaller window"
        )
    return WindowSet(usable, window)


def trajectories_in(sources: Path | str | Iterable[Path | str | Trajectory]) -> Iterator[Trajectory]:
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

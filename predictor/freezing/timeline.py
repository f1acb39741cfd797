"""Which layer froze when, what a step cost then, and what that saved: as figures, as a text and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent
from predictor.layers.flops import LayerFlops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LINES = 30
_FROZEN, _TRAINS, _LINE = "#3b6fb6", "#e3e7ee", "#d9822b"


@dataclass(frozen=True)
class Timeline:
    """The frozen sets of a training, up to a step.

    An event at step s holds from the step after it on. FLOPs are those of forward and backward passes, without what a
    feature cache saves; they are None where they have not been counted.
    """

    names: tuple[str, ...]
    """The layers' names, front to back."""
    events: tuple[FreezeEvent, ...]
    """The changes, in their order."""
    step: int
    """Steps done."""
    total_steps: int
    """Steps of the whole training."""
    flops: LayerFlops | None = None
    """What the layers cost."""
    dry_run: bool = False
    """Whether nothing really froze."""

    @property
    def phases(self) -> list[tuple[int, int, frozenset[int]]]:
        """Spans of steps with one frozen set: the steps done at their beginning and end, and the set. None is empty."""
        changes = [(0, frozenset[int]()), *((event.step, frozenset(event.frozen)) for event in self.events)]
        ends = [*(start for start, _ in changes[1:]), max(self.step, changes[-1][0])]
        return [(start, end, frozen) for (start, frozen), end in zip(changes, ends, strict=True) if end > start]

    @property
    def frozen(self) -> frozenset[int]:
        """Indices of the layers that are frozen now."""
        return frozenset(self.events[-1].frozen) if self.events else frozenset()

    @property
    def step_share(self) -> float | None:
        """FLOPs of a step now, as a share of a full step's."""
        return self._share(self.frozen)

    @property
    def saved_share(self) -> float | None:
        """FLOPs that the steps so far were spared, as a share of those of as many full steps."""
        if not self.step:
            return None if self.flops is None else 0.0
        spent = 0.0
        for start, end, frozen in self.phases:
            share = self._share(frozen)
            if share is None:
                return None
            spent += share * (end - start)
        return 1 - spent / self.step

    def figures(self) -> dict[str, float]:
        """For a log: frozen_layers, step_flops_share and saved_share, behind `freeze/`, or `freeze_dry_run/`."""
        values = {
            "frozen_layers": float(len(self.frozen)),
            "step_flops_share": self.step_share,
            "saved_share": self.saved_share,
        }
        group = "freeze_dry_run" if self.dry_run else "freeze"
        return {f"{group}/{name}": value for name, value in values.items() if value is not None}

    def dry_run_summary(self) -> list[str]:
        """Lines that say what a dry run would have frozen when, what that would have saved, and what is not known."""
        if not self.events:
            return [f"dry run of {self.step} steps: nothing would have frozen"]
        changes = [self._line(event) for event in self.events]
        if len(changes) > _MOST_LINES:
            changes[_MOST_LINES:] = [f"and {len(changes) - _MOST_LINES} more changes"]
        saved = self.saved_share
        share = "not known, they could not be counted" if saved is None else f"{saved:.1%}"
        return [
            f"dry run of {self.step} steps: nothing was frozen. This would have happened:",
            *(f"dry run:   {change}" for change in changes),
            f"dry run: FLOPs of these steps that it would have saved: {share}",
            "dry run: what it would have cost in accuracy is not known: all layers trained. A training that freezes "
            "shows it",
        ]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the timeline: the layers above, FLOPs of a step and the saving so far below.

        Args:
            path: where to write the picture; its ending says of which kind. By default it is returned alone.

        Raises:
            UsageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError("a picture needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(7.5, 2.2 + 0.22 * min(len(self.names), 60)), layout="constrained")
        if self.flops is None:
            self._draw_layers(figure.subplots())
        else:
            layers, shares = figure.subplots(2, 1, sharex=True, height_ratios=[max(2, len(self.names) / 4), 2])
            self._draw_layers(layers)
            self._draw_shares(shares)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _line(self, event: FreezeEvent) -> str:
        changes = "; ".join(
            f"{word} {self._listed(indices)}"
            for word, indices in (("freeze", event.froze), ("unfreeze", event.unfroze))
            if indices
        )
        share = self._share(frozenset(event.frozen))
        cost = "" if share is None else f": a step takes {share:.0%} of a full one's FLOPs"
        return f"step {event.step}: {changes} ({len(event.frozen)} of {event.layers} layers frozen){cost}"

    def _listed(self, indices: tuple[int, ...]) -> str:
        names = [self.names[index] for index in indices]
        return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} layers)"

    def _share(self, frozen: frozenset[int]) -> float | None:
        return None if self.flops is None else self.flops.share(frozen)

    def _draw_layers(self, axes: Any) -> None:
        count = len(self.names)
        axes.barh(range(count), [self.total_steps] * count, color=_TRAINS, height=0.8, label="trains")
        bars = [(index, start, end - start) for start, end, frozen in self.phases for index in sorted(frozen)]
        if bars:
            rows, starts, widths = zip(*bars, strict=True)
            axes.barh(rows, widths, left=starts, color=_FROZEN, height=0.8, label="frozen")
        every = -(-count // 40)
        axes.set_yticks(range(0, count, every), self.names[::every], fontsize=7)
        title = "layers that would have been frozen (dry run)" if self.dry_run else "frozen layers"
        axes.set(xlim=(0, self.total_steps), xlabel="" if self.flops else "step", title=title)
        axes.invert_yaxis()

    def _draw_shares(self, axes: Any) -> None:
        phases = self.phases
        edges, shares = [0, *(end for _, end, _ in phases)], [self._share(frozen) or 0.0 for _, _, frozen in phases]
        spent = np.cumsum(
            [0.0, *(share * (end - start) for (start, end, _), share in zip(phases, shares, strict=True))]
        )
        # Between two changes what was saved so far is a curve.
        steps = np.union1d(edges, np.linspace(0, edges[-1], 200))
        steps = steps[steps >= 1]
        axes.stairs(shares, edges, color=_FROZEN, label="of a step")
        axes.plot(steps, 1 - np.interp(steps, edges, spent) / steps, color=_LINE, label="saved so far")
        axes.set(ylim=(0, 1.05), xlabel="step", ylabel="share of FLOPs")
        axes.legend(frameon=False, fontsize=8)

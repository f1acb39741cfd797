"""Small multiples over time: loss, the cost of a step, and which layers were frozen when."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from evaluate.results import Results, Trial
from evaluate.svg import BAND, INK, Plot, colour, drawn
from evaluate.table import shortened

_PANEL_HEIGHT = 1.45
# Inches around the panels and between them. A layout found by drawing twice would double the time that a report takes.
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN, _ABOVE = 0.68, 0.14, 0.24, 0.5, 0.14, 0.3
# The time axis is cut into this many parts: a policy that changes its mind at every step must not fill the page.
_PARTS = 120


def loss_plot(results: Results, workload: str) -> Plot | None:
    """The test loss, and thinly the training loss, of every policy's trainings over those of the baseline.

    None where nothing was tested more than once: there is no line to draw.
    """
    ends = {
        policy: fmean(losses)
        for policy in results.policies
        if (losses := [t.loss for t in results.cell(workload, policy).values() if t.loss is not None])
    }
    trials = [trial for policy in results.policies for trial in results.cell(workload, policy).values()]
    if not ends or all(len(trial.curve) < 2 for trial in trials):
        return None
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    title = f"Test loss ends lowest under {_named(low)} ({ends[low]:.3g})"
    title += f", highest under {_named(high)} ({ends[high]:.3g})" if high != low else ""
    lines = {
        policy: [_losses(trial) for trial in results.cell(workload, policy).values()] for policy in results.policies
    }
    finite = [y for group in lines.values() for solid, _, bad in group if not bad for _, y in solid]

    def draw(axes: Axes, policy: str, place: int) -> None:
        for solid, thin, bad in lines[policy]:
            _line(axes, thin, place, linewidth=0.8, linestyle=(0, (1, 1.5)))
            _line(axes, solid, place, bad=bad)

    def trim(axes: Axes) -> None:
        if finite:  # a loss on its way to infinity would flatten all others
            axes.set_ylim(0, max(finite) * 1.05)

    note = "Solid: test loss; dotted: training loss; grey: the baseline; a cross: the training diverged."
    return _multiples(results, workload, title, "loss", note, draw, trim)


def step_cost_plot(results: Results, workload: str) -> Plot | None:
    """What a step cost in the course of every policy's trainings, over those of the baseline."""
    axis = results.suite.cost
    lines = {policy: [_costs(t, axis) for t in results.cell(workload, policy).values()] for policy in results.policies}
    lasts = {
        policy: fmean(ends) for policy, group in lines.items() if (ends := [y for line in group for y in _last(line)])
    }
    baseline = results.suite.baseline
    if baseline not in lasts:
        return None
    best = min(lasts, key=lasts.__getitem__)
    share = lasts[best] / lasts[baseline]
    if best != baseline and share < 0.95:
        title = f"Towards the end a step under {_named(best)} costs {share * 100:.0f} % of one under {_named(baseline)}"
    else:
        title = f"Towards the end no policy's step is cheaper than one under {_named(baseline)}"

    def draw(axes: Axes, policy: str, place: int) -> None:
        for line in lines[policy]:
            _line(axes, line, place)

    kind = "CPU milliseconds" if axis == "cpu_seconds" else "milliseconds"
    return _multiples(results, workload, title, f"{kind} a step", "Grey: the baseline.", draw, lambda a: a.set_ylim(0))


def timeline_plots(results: Results, workload: str) -> tuple[list[Plot], list[str]]:
    """A plot for each policy that froze anything, a panel a seed; and the names of those that froze nothing."""
    plots, idle = [], []
    for policy in results.policies:
        trials = [trial for trial in results.cell(workload, policy).values() if trial.layers]
        if any(event.frozen for trial in trials for event in trial.freezes):
            plots.append(_timeline(results, workload, policy, trials))
        elif trials:
            idle.append(policy)
    return plots, idle


def frozen_spans(trial: Trial) -> list[list[tuple[int, int]]]:
    """For each layer, front to back, the spans of steps over which it was frozen."""
    spans = []
    for place in range(len(trial.layers)):
        spans.append(_joined((start, end) for start, frozen, end in _stretches(trial) if place in frozen))
    return spans


def frozen_share(trial: Trial) -> float:
    """The share of layers x steps that was frozen."""
    total = len(trial.layers) * trial.steps
    return sum(end - start for spans in frozen_spans(trial) for start, end in spans) / total if total else 0.0


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch as one, and those without length left out."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        elif end > start:
            joined.append((start, end))
    return joined


def _stretches(trial: Trial) -> Iterator[tuple[int, frozenset[int], int]]:
    """(first step, frozen layers, step of the next change)."""
    ends = [event.step for event in trial.freezes[1:]] + [trial.steps]
    for event, end in zip(trial.freezes, ends, strict=True) if trial.freezes else ():
        yield event.step, event.frozen, min(end, trial.steps)


def _timeline(results: Results, workload: str, policy: str, trials: Sequence[Trial]) -> Plot:
    place = results.policies.index(policy)
    shares = [frozen_share(trial) for trial in trials]
    title = f"{_named(policy)} kept {fmean(shares) * 100:.0f} % of layers x steps frozen"
    length = _longest(trials)
    columns = min(3, len(trials))
    lines = -(-len(trials) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, trial in zip(grid.flat, trials, strict=False):
            lost = "" if trial.status == "finished" else f", {trial.status}"
            axes.set_title(f"seed {trial.seed}{lost}", fontsize="small" if lost else None)
            _bars(axes, trial, place, length)
        _finish(figure, grid, len(trials), "layer, front first", length, whole_y=True)
        grid[0][0].set_ylim(0, len(trials[0].layers))

    return Plot(title, drawn(_BOTTOM + _PANEL_HEIGHT * lines, draw, f"{workload}: {title}"))


def _bars(axes: Axes, trial: Trial, place: int, length: int) -> None:
    """A light area for what was trained, and on it a bar for each stretch in which layers were frozen."""
    axes.grid(False)
    axes.fill_between([0, trial.steps], 0, len(trial.layers), color=BAND, linewidth=0)
    part = max(1, length // _PARTS)
    bars = [
        Rectangle((left, layer), min(right, trial.steps) - left, 1.0)
        for layer, spans in enumerate(frozen_spans(trial))
        for left, right in _joined((a // part * part, -(-b // part) * part) for a, b in spans)
    ]
    if bars:
        outline = Path.make_compound_path(*(bar.get_transform().transform_path(bar.get_path()) for bar in bars))
        axes.add_patch(PathPatch(outline, facecolor=colour(place), linewidth=0))
    if trial.status != "finished":
        axes.plot([trial.steps], [len(trial.layers) / 2], marker="x", color=INK, markersize=7, markeredgewidth=1.6)


def _multiples(
    results: Results,
    workload: str,
    title: str,
    y_label: str,
    note: str,
    draw_policy: Callable[[Axes, str, int], None],
    finish: Callable[[Axes], object],
) -> Plot:
    """A panel a policy, the baseline in grey in each of them, all with the same axes."""
    baseline = results.suite.baseline
    others = [policy for policy in results.policies if policy != baseline and results.cell(workload, policy)]
    panels = others or [baseline]
    trials = [trial for policy in results.policies for trial in results.cell(workload, policy).values()]
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    lines = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, policy in zip(grid.flat, panels, strict=False):
            axes.set_title(shortened(policy, 44 // columns))
            for name in dict.fromkeys([baseline, policy]):
                draw_policy(axes, name, results.policies.index(name))
        finish(grid[0][0])
        _finish(figure, grid, len(panels), y_label, _longest(trials))

    height = max(2.4, _BOTTOM + _PANEL_HEIGHT * lines)
    return Plot(title, drawn(height, draw, f"{workload}: {title}"), note)


def _finish(figure: Figure, grid: Any, used: int, y_label: str, steps: int, *, whole_y: bool = False) -> None:
    """Common labels and time axis, no empty axes, and step numbers under the lowest panel of each column."""
    lines, columns = grid.shape
    width, height = figure.get_size_inches()
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - _TOP / height,
        bottom=_BOTTOM / height,
        wspace=_BETWEEN * columns / (inner_width - _BETWEEN * (columns - 1)),
        hspace=_ABOVE * lines / (inner_height - _ABOVE * (lines - 1)),
    )
    figure.supxlabel("optimizer step", x=(_LEFT + inner_width / 2) / width, y=0.04 / height, fontsize="medium")
    figure.supylabel(y_label, x=0.012, y=(_BOTTOM + inner_height / 2) / height, fontsize="medium")
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < used)
        axes.set_xlim(0, steps)
        ends = axes.set_xticks([0, steps / 2, steps], ["0", "", f"{steps:,}"])
        ends[0].label1.set_horizontalalignment("left")
        ends[-1].label1.set_horizontalalignment("right")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=whole_y))
        axes.tick_params(labelbottom=number in range(used - columns, used))


def _longest(trials: Sequence[Trial]) -> int:
    """Steps of the longest training, planned or taken: the length of the time axis."""
    return max(max(trial.planned_steps, trial.steps, 1) for trial in trials)


def _losses(trial: Trial) -> tuple[list[tuple[int, float]], list[tuple[int, float]], bool]:
    test = [(point.step, point.test_loss) for point in trial.curve if point.test_loss is not None]
    train = [(point.step, point.train_loss) for point in trial.curve if point.train_loss is not None]
    return test, train, trial.status == "diverged"


def _costs(trial: Trial, axis: str) -> list[tuple[int, float]]:
    seconds = [(p.step, p.train_seconds if axis == "train_seconds" else p.cpu_seconds) for p in trial.step_cost]
    return [(step, value * 1000) for step, value in seconds if value is not None]


def _last(line: Sequence[tuple[int, float]]) -> list[float]:
    """The values of the last tenth."""
    return [value for _, value in line[-max(1, len(line) // 10) :]] if line else []


def _line(axes: Axes, points: Sequence[tuple[int, float]], place: int, *, bad: bool = False, **style: Any) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=colour(place), alpha=0.85, **style)
    if bad:
        axes.plot(x[-1:], y[-1:], marker="x", color=INK, markersize=7, markeredgewidth=1.6)


def _named(policy: str) -> str:
    return shortened(policy, 60)

"""Small multiples over time: loss, the cost of a step, and which layers were frozen when."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from evaluate.analysis.families import MANY, colour_indices, families
from evaluate.report.format import shortened
from evaluate.report.panels import arrange, columns_for, height_for, letters_for, panel_grid
from evaluate.report.svg import BAND, INK, Plot, colour, drawn
from evaluate.trials.records import Results, Trial

# The time axis is cut into this many parts: a policy that changes its mind at every step must not fill the page.
_PARTS = 120
# How strongly the first and the last setting of a family are drawn.
_STRONG, _PALE = 0.9, 0.4
_SETTINGS = "Several settings of a policy: the paler, the later in the suite."


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

    def draw(axes: Axes, policy: str, index: int, strength: float) -> None:
        for solid, thin, bad in lines[policy]:
            _line(axes, thin, index, alpha=strength, linewidth=0.8, linestyle=(0, (1, 1.5)))
            _line(axes, solid, index, alpha=strength, bad=bad)

    def trim(axes: Axes) -> None:
        if finite:  # a loss on its way to infinity would flatten all others
            axes.set_ylim(0, max(finite) * 1.05)

    note = "Solid: test loss; dotted: training loss; grey: the baseline; a cross: the training diverged."
    return _multiples(results, workload, _Texts(title, "loss", note), draw, trim)


def step_cost_plot(results: Results, workload: str) -> Plot | None:
    """The cost of a step over the course of every policy's trainings, over those of the baseline.

    None where costs are FLOPs, since then trials may come from several machines; or where the baseline has none.
    """
    axis = results.suite.cost
    if axis == "flops":
        return None
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
        costs = f"{share * 100:.0f} %" if share >= 0.005 else "less than 1 %"
        title = f"Towards the end a step under {_named(best)} costs {costs} of one under {_named(baseline)}"
    else:
        title = f"Towards the end no policy's step is cheaper than one under {_named(baseline)}"

    def draw(axes: Axes, policy: str, index: int, strength: float) -> None:
        for line in lines[policy]:
            _line(axes, line, index, alpha=strength)

    kind = "CPU milliseconds" if axis == "cpu_seconds" else "milliseconds"
    texts = _Texts(title, f"{kind} a step", "Grey: the baseline.")
    return _multiples(results, workload, texts, draw, lambda axes: axes.set_ylim(0))


def timeline_plots(results: Results, workload: str) -> tuple[list[Plot], list[str]]:
    """A plot for each policy that froze anything, a panel a seed; and the names of those that froze nothing.

    With more than MANY policies a plot shows a family: one panel a setting, with its first seed.
    """
    by_family = len(results.policies) > MANY
    groups: list[tuple[str, Sequence[str]]] = [(policy, (policy,)) for policy in results.policies]
    if by_family:
        groups = [(family.name, family.members) for family in families(results)]
    known, plots, idle = colour_indices(results), [], []
    for name, policies in groups:
        cells = {policy: [t for t in results.cell(workload, policy).values() if t.layers] for policy in policies}
        cells = {policy: trials for policy, trials in cells.items() if trials}
        trials = [trial for cell in cells.values() for trial in cell]
        if any(event.frozen for trial in trials for event in trial.freezes):
            title = f"{_named(name)} kept {_shares(cells.values())} % of layers x steps frozen"
            panels = [(f"seed {trial.seed}", trial) for trial in trials]
            if by_family:
                panels = [(policy, cell[0]) for policy, cell in cells.items()]
            plots.append(_timeline(f"{workload}: {title}", title, panels, known[policies[0]]))
        elif trials:
            idle.append(name)
    return plots, idle


def frozen_spans(trial: Trial) -> list[list[tuple[int, int]]]:
    """For each layer, in order of execution, the spans of steps over which it was frozen."""
    spans = []
    for index in range(len(trial.layers)):
        spans.append(_joined((start, end) for start, frozen, end in _stretches(trial) if index in frozen))
    return spans


def frozen_share(trial: Trial) -> float:
    """The share of layers x steps that was frozen."""
    total = len(trial.layers) * trial.steps
    return sum(end - start for spans in frozen_spans(trial) for start, end in spans) / total if total else 0.0


def _shares(cells: Iterable[Sequence[Trial]]) -> str:
    """What the settings kept frozen on average, the least and the most of it, in percent."""
    shares = [fmean(frozen_share(trial) for trial in trials) * 100 for trials in cells]
    return " to ".join(dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares))))


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


def _timeline(spoken: str, title: str, panels: Sequence[tuple[str, Trial]], index: int) -> Plot:
    """A panel for each of the trainings, under the name that it comes with."""
    length = _longest([trial for _, trial in panels])
    columns = min(3, len(panels))

    def draw(figure: Figure) -> None:
        grid = panel_grid(figure, len(panels), columns)
        for axes, (name, trial) in zip(grid.flat, panels, strict=False):
            lost = "" if trial.status == "finished" else f", {trial.status}"
            text = f"{shortened(name, letters_for(columns))}{lost}"
            axes.set_title(text, fontsize="small" if lost else None)
            _bars(axes, trial, index, length)
        _finish(figure, grid, len(panels), "layer index", length, whole_y=True)
        grid[0][0].set_ylim(0, len(panels[0][1].layers))

    return Plot(title, drawn(height_for(len(panels), columns), draw, spoken))


def _bars(axes: Axes, trial: Trial, index: int, length: int) -> None:
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
        axes.add_patch(PathPatch(outline, facecolor=colour(index), linewidth=0))
    if trial.status != "finished":
        axes.plot([trial.steps], [len(trial.layers) / 2], marker="x", color=INK, markersize=7, markeredgewidth=1.6)


@dataclass(frozen=True)
class _Texts:
    """What is written around a figure."""

    title: str
    y_label: str
    note: str


def _multiples(
    results: Results,
    workload: str,
    texts: _Texts,
    draw_policy: Callable[[Axes, str, int, float], None],
    finish: Callable[[Axes], object],
) -> Plot:
    """A panel a family with all its settings, the baseline in grey in each of them, all with the same axes.

    Args:
        results: What is drawn, of one workload.
        workload: Its label.
        texts: What is written around the figure.
        draw_policy: Takes the axes, the policy, its index among the colours, and how strongly it should be drawn.
        finish: Takes the first axes, with which all share their scales.
    """
    baseline, known = results.suite.baseline, colour_indices(results)
    settings = {
        family.name: [policy for policy in family.members if results.cell(workload, policy)]
        for family in families(results)
    }
    panels = {name: policies for name, policies in settings.items() if policies} or {baseline: []}
    trials = [trial for policy in results.policies for trial in results.cell(workload, policy).values()]
    columns = columns_for(len(panels))

    def draw(figure: Figure) -> None:
        grid = panel_grid(figure, len(panels), columns)
        for axes, (name, policies) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(shortened(name, letters_for(columns)))
            draw_policy(axes, baseline, 0, _STRONG)
            for number, policy in enumerate(policies):
                faded = (_STRONG - _PALE) * number / max(1, len(policies) - 1)
                draw_policy(axes, policy, known[policy], _STRONG - faded)
        finish(grid[0][0])
        _finish(figure, grid, len(panels), texts.y_label, _longest(trials))

    several = any(len(policies) > 1 for policies in panels.values())
    svg = drawn(max(2.4, height_for(len(panels), columns)), draw, f"{workload}: {texts.title}")
    return Plot(texts.title, svg, f"{texts.note} {_SETTINGS}" if several else texts.note)


def _finish(figure: Figure, grid: Any, used: int, y_label: str, steps: int, *, whole_y: bool = False) -> None:
    """A common time axis, and what all panels share."""
    grid[0][0].set_xlim(0, steps)
    for axes in grid.flat:
        ends = axes.set_xticks([0, steps / 2, steps], ["0", "", f"{steps:,}"])
        ends[0].label1.set_horizontalalignment("left")
        ends[-1].label1.set_horizontalalignment("right")
    arrange(figure, grid, used, "optimizer step", y_label, whole_y=whole_y)


def _longest(trials: Sequence[Trial]) -> int:
    """Steps of the longest training, planned or taken: the length of the time axis."""
    return max(max(trial.planned_steps, trial.steps, 1) for trial in trials)


def _losses(trial: Trial) -> tuple[list[tuple[int, float]], list[tuple[int, float]], bool]:
    test = [(point.step, point.test_loss) for point in trial.curve if point.test_loss is not None]
    train = [(point.step, point.train_loss) for point in trial.curve if point.train_loss is not None]
    return test, train, trial.status == "diverged"


def _costs(trial: Trial, axis: str) -> list[tuple[int, float]]:
    seconds = [(p.step, p.seconds if axis == "train_seconds" else p.cpu_seconds) for p in trial.step_cost]
    return [(step, value * 1000) for step, value in seconds if value is not None]


def _last(line: Sequence[tuple[int, float]]) -> list[float]:
    """The values of the last tenth."""
    return [value for _, value in line[-max(1, len(line) // 10) :]] if line else []


def _line(axes: Axes, points: Sequence[tuple[int, float]], index: int, *, bad: bool = False, **style: Any) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=colour(index), **style)
    if bad:
        axes.plot(x[-1:], y[-1:], marker="x", color=INK, markersize=7, markeredgewidth=1.6)


def _named(policy: str) -> str:
    return shortened(policy, 60)

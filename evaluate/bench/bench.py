"""What the library itself costs and what freezing is worth, on a few workloads, against limits that have to be kept."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from tabulate import tabulate
from tqdm import tqdm

from collect.training.device import pick_device
from collect.training.provenance import provenance
from collect.workloads import Workload, load_workload
from data.sources import load_source
from data.sources.base import Source
from evaluate.bench.frozen_prefixes import LIMIT, SLACK, PrefixCost, prefix_costs
from evaluate.bench.memory import TOLERANCE, Change, PrefixMemory, prefix_memory
from evaluate.bench.overhead import LIMITS, Overhead, overheads
from evaluate.bench.suffix import Subject
from evaluate.trials.stopwatch import Spread
from predictor.errors import UsageError
from predictor.shared.files import write_json

HOOKS_ON = {"mlp-fashion": 12, "resnet8-fashion": 4, "texttransformer-glosses": 4}
"""Where hooks are measured, in how many rounds: the fastest steps that there are, convolutions, and attention."""
PREFIXES_ON = {"resnet20-fashion": 9, "vit-fashion": 9, "lite0-fashion": 5, "minilm-glosses": 5}
"""Where frozen prefixes are: networks trained from scratch, and pretrained ones, whose steps take a second."""


def run_bench(out: Path, device_name: str) -> bool:
    """Measure, print the tables and write `out` as JSON. True when every limit is kept.

    What needs a package that is missing is left out, with a line that says so.
    """
    device = pick_device(device_name)
    write_json(out, {})  # before minutes of work: a place that cannot be written to fails now
    prefixes, memory, left_out = _prefixes(device)
    shares = _shares(device)
    tables = (
        _prefix_table(prefixes),
        [f"left out: {why}" for why in left_out],
        _share_table(shares),
        _memory_table(memory),
    )
    print("\n\n".join("\n".join(lines) for lines in tables if lines))
    rows = {"fronts": _rows(prefixes), "shares": _rows(shares), "memory": _rows(memory)}
    write_json(out, {**provenance(), "device": str(device), **rows, "left_out": left_out})
    print(f"\nwritten: {out}")
    measured: list[PrefixCost | Overhead | PrefixMemory] = [*prefixes, *shares, *memory]
    return all(row.holds for row in measured)


def _prefixes(device: torch.device) -> tuple[list[PrefixCost], list[PrefixMemory], list[str]]:
    """The rows of both tables of frozen prefixes, and why workloads are left out."""
    costs: list[PrefixCost] = []
    memory: list[PrefixMemory] = []
    left_out: list[str] = []
    with tqdm(total=len(PREFIXES_ON), unit="workload", disable=None, dynamic_ncols=True) as bar:
        for name, rounds in PREFIXES_ON.items():
            _announce(bar, f"frozen prefixes: {name}")
            found = _loaded(name)
            if isinstance(found, str):
                left_out.append(found)
            else:
                # A workload takes minutes: the bar's clock should go on inside it.
                subject = Subject(*found, device)
                costs += prefix_costs(subject, rounds, bar.refresh)
                memory += prefix_memory(subject, bar.refresh)
            bar.update()
    return costs, memory, left_out


def _announce(bar: "tqdm[NoReturn]", doing: str) -> None:
    """Say what is measured: in the bar, or, where the output goes to a file and there is none, on a line."""
    bar.set_description(doing)
    if bar.disable:
        print(doing, flush=True)


def _loaded(name: str) -> tuple[Workload, Source] | str:
    """A workload and its source, or why it cannot be had here."""
    try:
        workload = load_workload(name)
        source = load_source(workload.source, train_samples=workload.recipe.train_samples)
        workload.model(source)
    except UsageError as error:
        return f"{name}: {error}"
    except ImportError as error:
        return f'{name}: {error}: pip install -e ".[toolkit,paper,huggingface]"'
    return workload, source


def _shares(device: torch.device) -> list[Overhead]:
    shares: list[Overhead] = []
    total = sum(rounds * (len(LIMITS) + 1) for rounds in HOOKS_ON.values())
    with tqdm(total=total, unit="span", disable=None, dynamic_ncols=True) as bar:
        for name, rounds in HOOKS_ON.items():
            _announce(bar, f"hooks: {name}")
            workload = load_workload(name)
            shares += overheads(workload, load_source(workload.source), device, rounds, bar.update)
    return shares


def _rows(rows: Sequence[Overhead | PrefixCost | PrefixMemory]) -> list[dict[str, object]]:
    return [{**asdict(row), "holds": row.holds} for row in rows]


def _prefix_table(rows: Sequence[PrefixCost]) -> list[str]:
    cells = [
        [
            *(row.workload, f"{row.frozen}/{row.layers}"),
            *(_times(row.cached), _prefix_verdict(row.cached, row.cached_holds)),
            *(_times(row.uncached), _prefix_verdict(row.uncached, row.uncached_holds)),
            *(f"{row.gain_cached.median:.2f}x", f"{row.gain_uncached.median:.2f}x"),
            *(f"{row.flops_cached:.2f}", f"{row.flops_uncached:.2f}", row.cut),
        ]
        for row in rows
    ]
    paces = ("workload", "frozen", "cached / limit", "", "uncached / limit", "", "full / cached", "full / uncached")
    head = (*paces, "FLOPs cached", "FLOPs uncached", "kept in the cache")
    return [
        "A step with its first layers frozen, over the limit: the other layers trained alone, on ready outputs",
        f"(uncached: and the prefix's inference): median [quartiles]. ok: at most {LIMIT}; small: over that, by at",
        f"most {SLACK:.0%} of a full step",
        *_lines(head, cells),
    ]


def _share_table(rows: Sequence[Overhead]) -> list[str]:
    cells = [
        (row.workload, row.hooks, _percent(row.share), f"{row.limit:.1%}", _verdict(row.holds), _times(row.ratio))
        for row in rows
    ]
    head = ("workload", "hooks", "share of training", "limit", "", "steps with / without")
    return ["What the hooks cost, at the cadence of a whole training: median [quartiles]", *_lines(head, cells)]


def _memory_table(rows: Sequence[PrefixMemory]) -> list[str]:
    cells = [
        [
            *(row.workload, f"{row.frozen}/{row.layers}"),
            *(_change(row.gradients), _change(row.optimizer), _change(row.activations)),
            *(_verdict(row.holds), _peaks(row)),
        ]
        for row in rows
    ]
    head = ("workload", "frozen", "gradients", "optimizer state", "saved activations", "", "peak of a step")
    notes = dict.fromkeys(row.peak_note for row in rows if row.peak_note)
    return [
        "Memory of a frozen prefix in MB, before -> after it froze, without a cache. To be gone: gradients and",
        f"optimizer state to the byte, activations to {TOLERANCE:.0%}, against the other layers trained alone",
        *_lines(head, cells),
        *(f"  no peak: {note}" for note in notes),
    ]


def _lines(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return tabulate(cells, head, tablefmt="plain", disable_numparse=True).splitlines()


def _change(change: Change) -> str:
    return f"{_megabytes(change.before)} -> {_megabytes(change.after)}"


def _peaks(row: PrefixMemory) -> str:
    if row.peak_before is None or row.peak_after is None:
        return "-"
    return f"{_megabytes(row.peak_before)} -> {_megabytes(row.peak_after)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _percent(spread: Spread) -> str:
    return f"{spread.median:.2%} [{spread.low:.2%}, {spread.high:.2%}]"


def _times(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def _prefix_verdict(ratio: Spread, holds: bool) -> str:
    return "ok" if ratio.median <= LIMIT else "small" if holds else "OVER"


def _verdict(holds: bool) -> str:
    return "ok" if holds else "OVER"

"""What the library itself costs, on a few small workloads, against the limits that it has to keep."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from collect.device import pick_device
from collect.provenance import provenance
from collect.workloads import load_workload
from data.sources import load_source
from evaluate.fronts import LIMIT, FrontCost, front_costs
from evaluate.overhead import LIMITS, Overhead, overheads
from evaluate.stopwatch import Spread
from predictor.files import write_json

WORKLOADS = {"mlp-fashion": 12, "resnet8-fashion": 4, "texttransformer-glosses": 4}
"""What is measured, in how many rounds: the fastest steps that there are, convolutions, and attention."""
_FRONT_ROUNDS = 5


def run_bench(out: Path, device_name: str) -> bool:
    """Measure, print the tables and write `out` as JSON. True when every limit is kept."""
    device = pick_device(device_name)
    write_json(out, {})  # before minutes of work: a place that cannot be written to fails now
    shares: list[Overhead] = []
    fronts: list[FrontCost] = []
    total = sum(rounds * (len(LIMITS) + 1) + _FRONT_ROUNDS for rounds in WORKLOADS.values())
    with tqdm(total=total, unit="span", disable=None, dynamic_ncols=True) as bar:
        for name, rounds in WORKLOADS.items():
            bar.set_description(name)
            workload = load_workload(name)
            source = load_source(workload.source)
            shares += overheads(workload, source, device, rounds, bar.update)
            fronts += front_costs(workload, source, device, _FRONT_ROUNDS, bar.update)
    print("\n".join([*_share_table(shares), "", *_front_table(fronts)]))
    write_json(out, {**provenance(), "device": str(device), "shares": _rows(shares), "fronts": _rows(fronts)})
    print(f"\nwritten: {out}")
    return all(row.holds for row in shares) and all(row.holds for row in fronts)


def _rows(rows: Sequence[Overhead | FrontCost]) -> list[dict[str, object]]:
    return [{**asdict(row), "holds": row.holds} for row in rows]


def _share_table(rows: Sequence[Overhead]) -> list[str]:
    cells = [
        (row.workload, row.hooks, _percent(row.share), f"{row.limit:.1%}", _verdict(row.holds), _times(row.ratio))
        for row in rows
    ]
    head = ("workload", "hooks", "share of training", "limit", "", "steps with / without")
    return ["What the hooks cost, at the cadence of a whole training: median [quartiles]", *_lines(head, cells)]


def _front_table(rows: Sequence[FrontCost]) -> list[str]:
    cells = [
        [
            *(row.workload, f"{row.frozen}/{row.layers}", _times(row.step), f"{LIMIT:.2f}", _verdict(row.holds)),
            *(f"{row.flops:.2f}", _times(row.suffix)),
        ]
        for row in rows
    ]
    head = ("workload", "frozen", "step / full step", "limit", "", "its FLOPs", "without computing the front")
    return ["What a step costs with its first layers frozen: median [quartiles]", *_lines(head, cells)]


def _lines(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    rows = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in [head, *cells])
    return ["  " + "  ".join(row).rstrip() for row in rows]


def _percent(spread: Spread) -> str:
    return f"{spread.median:.2%} [{spread.low:.2%}, {spread.high:.2%}]"


def _times(spread: Spread) -> str:
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def _verdict(holds: bool) -> str:
    return "ok" if holds else "OVER"

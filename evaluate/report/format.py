"""How figures and labels are written: in the terminal, in Markdown and on the page."""

from collections.abc import Sequence

from evaluate.analysis.area import FamilyArea
from evaluate.analysis.compute_multiplier import Multiplier, lengths_not_trained
from evaluate.analysis.oracle_file import Oracle, Schedule, best_multiplier
from evaluate.analysis.statistics import Estimate, Row
from evaluate.trials.records import Results

_WIDEST_LABEL = 60


def difference(value: Estimate) -> str:
    """An accuracy difference in percentage points, with its interval."""
    return f"{value.mean * 100:+.2f}" + _interval(value, 100, 2, "+")


def ratio(value: Estimate) -> str:
    """A ratio with its interval."""
    return f"{value.mean:.2f}x" + _interval(value, 1, 2, "")


def multiplier(value: Multiplier | None) -> str:
    """A compute multiplier with its interval, and in words where it is a bound; "-" for None."""
    if value is None:
        return "-"
    return ", ".join(filter(None, [ratio(value.value), outside(value)]))


def outside(value: Multiplier) -> str:
    """Where a policy lies outside of the curve of full training, and what that makes of its multiplier; else empty."""
    several = len(value.by_workload) > 1
    above, below = (f" on {len(names)}" if several else "" for names in (value.above, value.below))
    of = f" of {len(value.by_workload)}" if several else ""
    if value.above and value.below:
        return f"above the curve{above}, below it{below}{of}"
    if value.above:
        return f"above the curve{above}{of}: at least"
    return f"below the curve{below}{of}: at most" if value.below else ""


def bound(value: Multiplier) -> str:
    """Whether a compute multiplier is "at least" or "at most" its value; empty where it is neither, or both."""
    if value.at_least == value.at_most:
        return ""
    return "at least" if value.at_least else "at most"


def lowest(value: Multiplier | None) -> str:
    """The smallest of the workloads' multipliers and where it is; empty for one workload alone, "-" for None."""
    if value is None:
        return "-"
    workload, factor = value.lowest
    return f"{factor:.2f}x on {plain(workload)}" if len(value.by_workload) > 1 else ""


def curve_gaps(results: Results) -> str:
    """Which lengths the curve of full training lacks, and what that does to the multipliers; empty for none."""
    lacking = [f"{plain(label)} on {plain(workload)}" for workload, label in lengths_not_trained(results)]
    if not lacking:
        return ""
    return (
        "The curve of full training lacks lengths that did not finish with all seeds, so compute multipliers may be "
        f"too large: {', '.join(lacking)}"
    )


def area(value: Estimate) -> str:
    """An area under a Pareto front with its interval."""
    return f"{value.mean:.3f}" + _interval(value, 1, 3, "")


def area_difference(value: Estimate) -> str:
    """An area less another with its interval."""
    return f"{value.mean:+.3f}" + _interval(value, 1, 3, "+")


def area_workloads(row: FamilyArea, workloads: int) -> str:
    """On how many of the workloads there is an area; empty for all of them."""
    return "" if row.workloads >= workloads else f"on {row.workloads} of {workloads} workloads"


def accuracy(row: Row) -> str:
    """Mean accuracy in percent, and its standard deviation over the seeds."""
    if row.accuracy is None:
        return "-"
    deviation = "" if row.accuracy_deviation is None else f" ±{row.accuracy_deviation * 100:.2f}"
    return f"{row.accuracy * 100:.2f}{deviation}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 in percent; "-" for None."""
    return "-" if share is None else f"{share * 100:.{digits}f} %"


def oracle_note(oracle: Oracle, results: Results) -> str:
    """What an oracle is and what it found, for readers of a share of its saving."""
    text = (
        f"Oracle of {oracle.workload}: the best of {oracle.tried} freezing schedules that were tried, chosen on the "
        "test set, so part of it is luck, and what was not tried may be better. "
    )
    text += oracle_finding(oracle, results.suite.margin)
    best = best_multiplier(oracle, results, oracle.workload)
    if best is None:
        return text
    least = "at least " if best.at_least else ""
    edge = _edge(oracle, best.schedule, cached=True)
    return f"{text}. Its largest compute multiplier: {least}{best.value:.2f}x, by {best.schedule.words}{edge}"


def oracle_finding(oracle: Oracle, margin: float) -> str:
    """The cheapest schedules within a margin, with and without a cache, and whether the search ended at its edge."""
    found = {cached: oracle.best_within(-margin, cached=cached) for cached in (True, False)}
    kinds = [(cached, best) for cached, best in found.items() if best and (cached is False or best.cache)]
    parts = [f"{best.flops_share:.0%} by {best.words}{_edge(oracle, best, cached=cached)}" for cached, best in kinds]
    within = f"FLOPs within {margin * 100:g} pp: "
    return within + ("; without a cache ".join(parts) or "no schedule that was tried")


def _edge(oracle: Oracle, best: Schedule, *, cached: bool) -> str:
    """Where the best is the cheapest that was tried, it is not known to be the best there is."""
    return " (the cheapest tried: the search ended at its edge)" if oracle.at_edge(best, cached=cached) else ""


def plain(text: str) -> str:
    """`text` with everything that could steer a terminal made visible."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shortened(text: str, length: int) -> str:
    """`text` made plain and cut in the middle to `length` characters: labels differ at both ends."""
    text = plain(text)
    if len(text) <= length:
        return text
    head = length * 3 // 5
    return f"{text[:head]}…{text[head + 1 - length :]}"


def distinct_length(labels: Sequence[str], least: int) -> int:
    """The length, from `least` on, from which `shortened` leaves different labels different."""
    lengths = range(least, _WIDEST_LABEL)
    return next(
        (length for length in lengths if len({shortened(label, length) for label in labels}) == len(labels)),
        _WIDEST_LABEL,
    )


def _interval(value: Estimate, scale: float, digits: int, sign: str) -> str:
    if not value.bounded:
        return " [?]"
    return f" [{value.low * scale:{sign}.{digits}f}, {value.high * scale:{sign}.{digits}f}]"

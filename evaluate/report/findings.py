"""What a suite found in plain sentences, and what that means for the reader: a few lines for each workload."""

from collections.abc import Sequence
from textwrap import fill

from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers, full_training_lengths
from evaluate.analysis.statistics import (
    AS_ACCURATE,
    LESS_ACCURATE,
    Row,
    cheapest,
    compare,
    overall,
    percentage_points,
)
from evaluate.report import format as write
from evaluate.trials.records import Results

MOST_POLICIES = 8
"""A suite with more policies than this is a study: its tables say more than sentences would."""

_Found = tuple[Row, Multiplier]


def headline(results: Results, rows: Sequence[Row]) -> list[str]:
    """What the suite shows, in a few sentences, the most important first.

    Which policy beats training for fewer steps and loses no accuracy; which one beats it at less accuracy; and the
    cheapest that loses none. Without a second length of full training, the last alone.
    """
    multipliers, lengths = compute_multipliers(results), full_training_lengths(results)
    known = [(row, multipliers.get((row.workload, row.policy))) for row in overall(rows) if row.policy not in lengths]
    compared = [(row, found) for row, found in known if found is not None and row.policy != results.suite.baseline]
    if not compared:
        return [cheapest(results, rows)]
    within = f"as accurate as {results.suite.baseline} within {percentage_points(results.suite.margin)}"
    good = [(row, found) for row, found in compared if row.verdict == AS_ACCURATE]
    shown = [(row, found) for row, found in good if found.value.low > 1 and not found.at_most]
    if not good:
        return [_best(compared, f"No policy is shown to be {within}; the largest compute multiplier")]
    if not shown:
        first = _best(good, f"No policy {within} is shown to beat training for fewer steps; the best of them")
    else:
        first = _best(shown, f"Beats training for fewer steps and is {within}")
    sentences = [first]
    best = [(row, found) for row, found in compared if found.value.low > 1 and not found.at_most]
    if _largest(best or good)[0] not in [row for row, _ in shown or good]:
        row, _ = _largest(best)
        lost = f"{row.difference.mean * 100:+.2f} pp" if row.difference else "less accuracy"
        sentences.append(_best(best, f"Shown to beat fewer steps, but not to be as accurate ({lost})"))
    return [*sentences, cheapest(results, rows)]


def _largest(known: Sequence[_Found]) -> _Found:
    """That with the largest multiplier. One that is at most so large comes behind all others."""
    return max(known, key=lambda each: (not each[1].at_most, each[1].value.mean))


def _best(known: Sequence[_Found], what: str) -> str:
    """The policy with the largest compute multiplier, in a sentence."""
    row, found = _largest(known)
    figures = " ".join(filter(None, ["compute multiplier", write.bound(found), write.ratio(found.value)]))
    least = write.lowest(found)
    return f"{what}: {row.policy}, {figures}{f', lowest {least}' if least else ''}."


def findings(results: Results) -> list[tuple[str, list[str]]]:
    """For each workload two sentences a policy that does more than change the length of training.

    Returns:
        Pairs of a workload and its sentences. Empty for a suite with more than MOST_POLICIES such policies.
    """
    lengths = {*full_training_lengths(results), results.suite.baseline}
    policies = [policy for policy in results.policies if policy not in lengths]
    if not 0 < len(policies) <= MOST_POLICIES:
        return []
    rows = {(row.workload, row.policy): row for row in compare(results)}
    multipliers = compute_multipliers(results)
    found = []
    for workload in results.workloads:
        known = [(rows[workload, policy], multipliers.get((workload, policy))) for policy in policies]
        lines = [sentence(row, multiplier, results) for row, multiplier in known if row.difference is not None]
        found.append((workload, lines or ["no policy has finished trainings to compare yet."]))
    return found


def sentence(row: Row, multiplier: Multiplier | None, results: Results) -> str:
    """A policy's compute multiplier on a workload, what follows from it, and what it saved and cost."""
    margin = f"{results.suite.margin * 100:g} pp"
    assert row.difference is not None
    cost = f"{row.flops_share:.0%} of full training's compute" if row.flops_share else "an unknown share of the compute"
    text = f"It took {cost}; accuracy {write.difference(row.difference)} pp: "
    if row.verdict == AS_ACCURATE:
        text += f"as accurate as full training, within {margin}."
    elif row.verdict == LESS_ACCURATE:
        text += f"less accurate than full training, by more than {margin}."
    else:
        text += f"these seeds cannot tell whether it stays within {margin}."
    return f"{row.policy}: {_meaning(row, multiplier)} {text}"


def _meaning(row: Row, multiplier: Multiplier | None) -> str:
    if multiplier is None or not multiplier.value.bounded:
        return "whether fewer steps would have done as well was not measured."
    figures = " ".join(filter(None, ["compute multiplier", write.bound(multiplier), write.ratio(multiplier.value)]))
    if multiplier.at_most and row.verdict != AS_ACCURATE:
        return f"{figures}; less accurate than the shortest full training that was tried: do not use it here."
    if multiplier.value.low > 1 and not multiplier.at_most:
        advice = "use it here" if row.verdict == AS_ACCURATE else "worth it where that accuracy is enough"
    elif multiplier.value.high < 1:
        advice = "train for fewer steps instead"
    elif row.verdict == LESS_ACCURATE:
        advice = "not worth it here: fewer steps may do as well"
    else:
        advice = "safe, but not shown to beat fewer steps" if row.verdict == AS_ACCURATE else "more seeds would tell"
    return f"{figures}, what fewer steps cost to be as accurate, over its own cost: {advice}."


def text(results: Results, width: int) -> str:
    """The findings for a terminal, wrapped; empty where there are none."""
    lines = []
    for workload, sentences in findings(results):
        lines.append(f"{write.plain(workload)}:")
        lines += [fill(write.plain(each), width, initial_indent="  - ", subsequent_indent="    ") for each in sentences]
    return "\n".join(["What this run found", *lines]) if lines else ""

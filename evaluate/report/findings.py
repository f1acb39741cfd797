"""What a suite found in plain sentences, and what that means for the reader: a few lines for each workload."""

from textwrap import fill

from evaluate.analysis.compute_multiplier import Multiplier, compute_multipliers, full_training_lengths
from evaluate.analysis.statistics import AS_ACCURATE, LESS_ACCURATE, Row, compare
from evaluate.report import format as write
from evaluate.trials.records import Results

MOST_POLICIES = 8
"""A suite with more policies than this is a study: its tables say more than sentences would."""


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
    """What a policy saved and cost on a workload, and what follows from it."""
    margin = f"{results.suite.margin * 100:g} pp"
    assert row.difference is not None
    cost = f"{row.flops_share:.0%} of full training's compute" if row.flops_share else "an unknown share of the compute"
    text = f"{row.policy} took {cost}; accuracy {write.difference(row.difference)} pp: "
    if row.verdict == AS_ACCURATE:
        text += f"as accurate as full training, within {margin}."
    elif row.verdict == LESS_ACCURATE:
        text += f"less accurate than full training, by more than {margin}."
    else:
        text += f"these seeds cannot tell whether it stays within {margin}."
    return f"{text} {_meaning(row, multiplier)}"


def _meaning(row: Row, multiplier: Multiplier | None) -> str:
    if multiplier is None or not multiplier.value.bounded:
        return "Whether fewer steps would have done as well was not measured."
    if multiplier.at_most and row.verdict != AS_ACCURATE:
        return "It is less accurate than the shortest full training that was tried: do not use it here."
    least = "at least " if multiplier.at_least else "at most " if multiplier.at_most else ""
    fewer = f"Training for fewer steps takes {least}{write.ratio(multiplier.value)} the compute to get there"
    if multiplier.value.low > 1 and not multiplier.at_most:
        advice = "use it here" if row.verdict == AS_ACCURATE else "worth it where that accuracy is enough"
    elif multiplier.value.high < 1:
        advice = "train for fewer steps instead"
    elif row.verdict == LESS_ACCURATE:
        advice = "not worth it here: fewer steps may do as well"
    else:
        advice = "safe, but not shown to beat fewer steps" if row.verdict == AS_ACCURATE else "more seeds would tell"
    return f"{fewer}: {advice}."


def text(results: Results, width: int) -> str:
    """The findings for a terminal, wrapped; empty where there are none."""
    lines = []
    for workload, sentences in findings(results):
        lines.append(f"{write.plain(workload)}:")
        lines += [fill(write.plain(each), width, initial_indent="  - ", subsequent_indent="    ") for each in sentences]
    return "\n".join(["What this run found", *lines]) if lines else ""

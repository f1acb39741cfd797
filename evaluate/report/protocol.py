"""How the times of a suite's trials were measured, and whether their ratios mean anything."""

from dataclasses import dataclass

from evaluate.trials.records import Results


@dataclass(frozen=True)
class Protocol:
    """What a reader of the costs should know."""

    sentence: str
    warning: bool
    """Whether the costs are not to be trusted."""


def protocol(results: Results) -> Protocol:
    """How the costs that the results are compared by were measured, as the trials themselves say."""
    axis, trials = results.suite.cost, results.trials
    if axis == "flops":
        return Protocol("Costs are FLOPs and not times: they are the same on every machine.", False)
    if any(trial.adopted for trial in trials) or len(_machines(results)) > 1:
        return Protocol(
            "Seconds of different machines stand beside each other here: do not trust their ratios, and compare by "
            "FLOPs with --cost flops.",
            True,
        )
    if all(trial.slots <= 1 for trial in trials):
        return Protocol("Trials ran one at a time, interleaved.", False)
    if axis == "cpu_seconds":
        return Protocol(
            "Trials ran side by side, so wall-clock times would compare the company a trial had; CPU time and FLOPs "
            "do not.",
            False,
        )
    return Protocol(
        "Trials ran side by side, so wall-clock times compare the company that a trial had: compare by CPU time with "
        "--cost cpu, or by FLOPs with --cost flops.",
        True,
    )


def _machines(results: Results) -> set[tuple[str, str]]:
    """The processors and GPUs that the trials name; a trial that failed names none."""
    known = [trial.hardware for trial in results.trials if trial.hardware]
    return {(str(each.get("cpu")), str(each.get("gpu"))) for each in known}

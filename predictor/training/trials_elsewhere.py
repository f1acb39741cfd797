"""Trials of a study whose folds other processes score: several at once, each as far as its folds have come."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from predictor.errors import UsageError
from predictor.training.shared_search import finished, give_up

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Steps = Generator[tuple[Any, int], list[float], float]
"""One trial: yields settings and a fold, is sent that fold's scores, and returns the trial's score. An error that is
thrown into it says why a fold has none. Raises TrialPruned."""


@dataclass(frozen=True)
class Fold:
    """What is to be scored: a trial's settings on one fold."""

    trial: int
    number: int
    choice: Any
    """The settings, as the `Steps` gave them."""


Take = Callable[[Fold, list[float] | UsageError], Fold | None]
"""Takes the scores of a fold, or why it has none, and returns the fold that comes next in its place."""


class Elsewhere(Protocol):
    """Scores folds in other processes."""

    at_once: int
    """Folds at once, each of another trial."""

    def score(self, first: Sequence[Fold], take: Take) -> None:
        """Score the first folds and all that `take` returns, and return when none is left."""
        ...


def run_trials_elsewhere(
    study: "optuna.Study",
    steps: "Callable[[optuna.Trial], Steps]",
    elsewhere: Elsewhere,
    *,
    trials: int,
    timeout: float | None,
    after: "Callable[[FrozenTrial], None]",
) -> None:
    """Run trials until the study has as many finished ones as asked for, and not one more.

    One at a time makes the study of `optuna.Study.optimize`. With several, the next settings are drawn before all
    results are there, so that who is faster has a say.

    Args:
        study: the study, which no other process uses.
        steps: what runs a trial.
        elsewhere: what scores folds.
        trials: finished trials of the study at the end.
        timeout: begin no trial after so many seconds.
        after: called with each trial that ended.
    """
    import optuna

    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    running: dict[int, tuple[optuna.Trial, Steps]] = {}

    def begin() -> Fold | None:
        if time.monotonic() >= end or len(finished(study)) + len(running) >= trials:
            return None
        trial = study.ask()
        running[trial.number] = trial, steps(trial)
        return go_on(trial.number, next)

    def take(fold: Fold, scores: list[float] | UsageError) -> Fold | None:
        if isinstance(scores, UsageError):
            return go_on(fold.trial, lambda steps: steps.throw(scores))
        return go_on(fold.trial, lambda steps: steps.send(scores))

    def go_on(number: int, how: Callable[[Steps], tuple[Any, int]]) -> Fold | None:
        trial, steps = running[number]
        try:
            choice, fold = how(steps)
            return Fold(number, fold, choice)
        except StopIteration as ended:
            told = study.tell(trial, ended.value)
        except optuna.TrialPruned:
            told = study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        del running[number]
        after(told)
        return begin()

    try:
        first = [fold for fold in (begin() for _ in range(elsewhere.at_once)) if fold is not None]
        if first:
            elsewhere.score(first, take)
    finally:  # those that an error or Ctrl-C leaves
        for number in running:
            give_up(study, number)

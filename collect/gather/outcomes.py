"""Gathers outcomes of freezing: which of a run's continuations are missing, and the packed file of all runs."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collect.gather.continuation_plan import Choices
from collect.gather.gathering import Kind, State
from collect.gather.plan import RunConfig
from collect.training.device import deterministic_environment
from data.outcomes.records import Key, Outcome, OutcomeFolder, outcome_of, read_outcomes, write_outcomes
from predictor.errors import UsageError
from predictor.shared.files import held, read_json_lines


class Outcomes(Kind):
    """The final losses of each run's continuations with layers frozen, in one file of JSON lines.

    Each training has one CPU thread, so that its numbers do not depend on how many run at once, and on CUDA operators
    that give the same each time: what is compared differs by what was frozen, and by nothing else.

    Args:
        files: Where the files go.
        choices: Which continuations a run has.
    """

    title = "outcomes of"
    target = "collect.gather.continuations:record_outcomes"
    threads = 1
    packs_after_each_run = True

    def __init__(self, files: OutcomeFolder, choices: Choices) -> None:
        self.files: OutcomeFolder = files
        self.environment = deterministic_environment()
        self._choices = choices
        self._known: dict[str, tuple[Outcome, ...]] = {}

    @property
    def next_command(self) -> str:
        """The command that summarizes the packed file."""
        return f"python -m data outcomes {self.files.packed} --trajectories FILE"

    @property
    def config(self) -> dict[str, Any]:
        """The choices."""
        return self._choices.as_dict()

    @property
    def remark(self) -> str:
        """How many trainings a run becomes."""
        trainings = 1 + len(self._choices.prefixes) + self._choices.singles
        return f"; each goes on from {len(self._choices.points)} points, up to {trainings} times from each"

    def state(self, run: RunConfig) -> State:
        """The state of a run, by the files that exist."""
        there = self.files.run(run.id).is_file()
        if there and self._has_all(read_outcomes(self.files.run(run.id))):
            return "finished"
        return "begun" if there or self.files.under_way(run.id).exists() else "to do"

    def check(self, run: RunConfig) -> bool:
        """Read a run's file, and say whether it was done with these choices. A file for others is added to."""
        outcomes = self._known[run.id] = read_outcomes(self.files.run(run.id))
        finished = self._has_all(outcomes)
        if finished:
            self._remove_leftovers(run.id, outcomes)
        return finished

    def payload(self, run: RunConfig) -> dict[str, Any]:
        """The choices."""
        return {"choices": self._choices.as_dict()}

    def files_of(self, run_id: str) -> Sequence[Path]:
        """The outcomes with other choices, and the folder of what is under way."""
        return self.files.run(run_id), self.files.under_way(run_id)

    def take(self, run_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """Read the file that the job wrote."""
        self._known[run_id] = read_outcomes(self.files.run(run_id))
        return result

    def pack(self, runs: Sequence[RunConfig]) -> str:
        """Write the outcomes of the runs into one file."""
        for run in runs:
            if run.id not in self._known:  # another shard's
                self._known[run.id] = read_outcomes(self.files.run(run.id))
        write_outcomes(self.files.packed, (outcome for run in runs for outcome in self._known[run.id]))
        return str(self.files.packed)

    def _has_all(self, outcomes: Sequence[Outcome]) -> bool:
        return any(outcome.facts.get("choices") == self._choices.as_dict() for outcome in outcomes)

    def _remove_leftovers(self, run_id: str, finished: Sequence[Outcome]) -> None:
        """Remove the leftovers of a run that was killed between its last two actions.

        Interrupted work with other choices stays, and so does the work of another gather.
        """
        if not self.files.under_way(run_id).exists():
            return
        with contextlib.suppress(UsageError), held(self.files.log(run_id), "another gather"):
            known = {outcome.key for outcome in finished}
            if all(_key(row) in known for row in read_json_lines(self.files.so_far(run_id))):
                shutil.rmtree(self.files.under_way(run_id), ignore_errors=True)


def _key(row: dict[str, Any]) -> Key | None:
    """The key of a line's outcome; None for a line of another version."""
    try:
        return outcome_of(row).key
    except ValueError:
        return None

"""An engine without processes, for tests of what stands around it, and suites whose runs take a moment."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from collect.gather.plan import read_suite
from collect.jobs.engine import Event, Job, Report

SMALL = """
[sampling]
weights = 8
snapshots = 4
[probe]
samples = 8
features = 16
"""
"""The head of a suite whose runs are recorded in a moment."""
MLP = '[[runs]]\nworkload = "mlp-digits"\ntrain_samples = 96\nepochs = 2\n'
"""A table of such runs, of six steps each."""


@dataclass
class InlineEngine:
    """Runs jobs in this process, one after the other, and notes their ids."""

    ids: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job], folder: Path, log: Callable[[str], Path], report: Report) -> None:
        waiting = list(jobs)
        while waiting:
            job = waiting.pop(0)
            self.ids.append(job.id)
            log(job.id).parent.mkdir(parents=True, exist_ok=True)
            module, function = job.target.split(":")
            try:
                work = getattr(importlib.import_module(module), function)
                event: Event = {"done": json.loads(json.dumps(work(job.payload, folder, lambda share: None)))}
            except Exception as error:
                event = {"failed": str(error)}
            following = report(job, event)
            waiting = waiting if following is None else [following, *waiting]


def put_inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the inline engine the default one. Returns the ids of its jobs."""
    engine = InlineEngine()
    monkeypatch.setattr("collect.jobs.LocalEngine", lambda *settings: engine)
    return engine.ids


def ids_of(suite: str) -> list[str]:
    return [run.id for run in read_suite(suite).runs]

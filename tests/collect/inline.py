"""The engine without processes, for tests of what stands around it."""

import importlib
import json
from collections.abc import Callable
from typing import Any

from collect.jobs.local import Job

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
"""A table of such runs."""


def noting(ids: list[str]) -> Callable[..., None]:
    """`run_inline`, which also notes the ids of its jobs, in order."""

    def run(jobs: list[Job], **options: Any) -> None:
        ids.extend(job.id for job in jobs)
        run_inline(jobs, **options)

    return run


def run_inline(jobs: list[Job], **options: Any) -> None:
    """Does what `run_jobs` does, here and in order."""
    for job in jobs:
        options["log"](job.id).parent.mkdir(parents=True, exist_ok=True)
        module, function = job.target.split(":")
        try:
            work = getattr(importlib.import_module(module), function)
            result = work(job.payload, options["folder"], lambda share: None)
        except Exception as error:
            options["on_failed"](job, str(error))
        else:
            options["on_done"](job, json.loads(json.dumps(result)))

"""The engine without processes, for tests of what stands around it."""

import importlib
import json
from typing import Any

from collect.engines import Job


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

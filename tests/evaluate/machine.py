"""A small suite, and what stands in for the processes that its trials run in."""

from evaluate.trials import run as run_module
from evaluate.trials.config import TrialConfig
from evaluate.trials.records import ACCOUNTING
from evaluate.trials.suite import PolicyEntry, Suite, WorkloadEntry

SUITE = Suite(
    "mine",
    (WorkloadEntry("mlp-digits", "mlp-digits"),),
    (PolicyEntry("none", "none"), PolicyEntry("linear", "linear")),
    (0, 1),
)


class Machine:
    """Stands in for run_jobs: `fails` names titles that fail, `dies_after` a number of trials before a kill."""

    def __init__(self, monkeypatch):
        self.ran, self.fails, self.dies_after = [], set(), None
        monkeypatch.setattr(run_module, "run_jobs", self)

    def __call__(self, jobs, *, on_done, on_failed, **options):
        for count, job in enumerate(jobs):
            if count == self.dies_after:
                raise KeyboardInterrupt
            self.ran.append(job.title)
            if job.title in self.fails:
                on_failed(job, "it broke")
            else:
                figures = {
                    "accounting": ACCOUNTING,
                    "accuracy": 0.9,
                    "train_seconds": 1.0,
                    "cpu_seconds": 1.0,
                    "flops": 10,
                }
                on_done(
                    job,
                    {
                        **TrialConfig.from_payload(job.payload).row,
                        "status": "finished",
                        "accounting": ACCOUNTING,
                        **figures,
                    },
                )

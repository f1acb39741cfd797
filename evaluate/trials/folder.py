"""Where a suite's files lie."""

from pathlib import Path

PUBLISHED = Path(__file__).parents[1] / "results" / "trials"
"""Where this repository keeps the trials that it publishes, packed, a file for each suite."""


class SuiteFolder:
    """Names every file of a suite's results."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.suite = root / "suite.json"
        self.results = root / "results.jsonl"
        self.lock = root / ".lock"
        self.earlier = root / "earlier.jsonl"
        """Results that the suite no longer asks for, such as those with the predictor before."""

    def log(self, trial_id: str) -> Path:
        """What a trial printed."""
        return self.root / "logs" / f"{trial_id}.log"

    def predictor(self, mark: str) -> Path:
        """The suite's own copy of the predictor with a fingerprint, so that training another one changes no trial."""
        return self.root / "predictors" / f"{mark}.safetensors"

"""One trial's configuration: what its id, its process and its line of results.jsonl are made from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from collect.training.state import Scores
from evaluate.trials.suite import PolicyEntry

BY_FINGERPRINT = "sha256:"
"""How a predictor option begins that names a file by its fingerprint: a trial's id does not depend on a path."""


@dataclass(frozen=True)
class TrialConfig:
    """A training of a workload under a policy with a seed. Everything in it can be written as JSON."""

    workload: str
    """What `collect.workloads.load_workload` knows it by."""
    label: str
    """What the suite calls the workload."""
    family: str
    source: str
    recipe: Mapping[str, Any]
    """The whole recipe, with the policy's factor on the learning rate."""
    policy: PolicyEntry
    """With the trial's own options: a predictor stands there by its fingerprint, and a policy that draws has a seed."""
    seed: int
    device: str
    """The kind of device: cpu, cuda or mps."""
    slots: int = 1
    """Trials that share the machine's cores, or the GPU, at a time."""
    scores: Scores = "epoch"
    """When it is tested."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the user's own code, by "policy" and "workload"; empty for the toolkit's."""

    @property
    def config(self) -> dict[str, Any]:
        """What the trial's numbers depend on, but for versions and hardware."""
        policy = {"name": self.policy.name, "label": self.policy.label, "options": self.policy.options}
        return {
            "workload": self.workload,
            "label": self.label,
            "source": self.source,
            "recipe": self.recipe,
            "policy": {**policy, **self.policy.changes},
            "seed": self.seed,
            "device": self.device,
            **({"code": self.code} if self.code else {}),  # changed code of the user's makes another trial
        }

    @property
    def id(self) -> str:
        """The trial's name: a hash of its configuration, so that the same trial is never run twice."""
        return trial_id(self.config)

    @property
    def title(self) -> str:
        """What the progress bar and reports call it."""
        return f"{self.label}, {self.policy.label}, seed {self.seed}"

    @property
    def row(self) -> dict[str, Any]:
        """What is known of its line of results.jsonl before it is run."""
        return {
            "trial_id": self.id,
            "workload": self.label,
            "family": self.family,
            "source": self.source,
            "policy": self.policy.label,
            "policy_name": self.policy.name,
            "policy_options": self.policy.options,
            "seed": self.seed,
            "slots": self.slots,
            "config": self.config,
        }

    def as_payload(self) -> dict[str, Any]:
        """The configuration as a job carries it to its process."""
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> "TrialConfig":
        """The configuration that `as_payload` gave."""
        return cls(**{**payload, "policy": PolicyEntry(**payload["policy"])})


def trial_id(config: Mapping[str, Any]) -> str:
    """The id of a trial with this configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

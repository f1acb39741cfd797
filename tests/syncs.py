"""How often the host waits for the device in a training, counted on the second device: `python -m tests.syncs`.

A wait lets the device run dry, so a step in which nothing is due has none. The table says what was counted for each
policy, and for the parts that go with a training.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from collect.hooks.cka import CKARecorder, ProbeSpec
from collect.hooks.infobatch import InfoBatch
from collect.hooks.recorder import Recorder
from collect.hooks.sieve import Sieve
from collect.training.loop import Hook, Training, train
from predictor import FeatureCache, FreezeController, FreezePolicy, make_policy
from predictor.model.sampling import SampleSpec
from predictor.policies import POLICIES
from tests.collect.tiny import TinyNet, tiny_source, tiny_workload
from tests.conftest import ToyNet
from tests.predictor.scripted import Script
from tests.second_device import NAME, Syncs, second_device

STEPS = 40
OPTIONS: dict[str, dict[str, Any]] = {
    "shorter": {"budget": 0.5},
    "stopped": {"budget": 0.5},
    "static": {"layers": 2},
    "linear": {"start": 0.25},
    "spfde": {"blocks": 3, "target": 0.9},
    "autofreeze": {"intervals": 6},
    "pipetransformer": {"epochs": 6, "adaptive": True},
    "greentrainer": {"rounds": 6},
    "slimfit": {"every": 4},
    "lisa": {"layers": 1, "every": 5},
    "grades": {"share": 2.0, "grace": 0.2, "every": 3},
    "autorgn": {"criterion": "snr", "threshold": 2.0, "rounds": 4, "batches": 2},
    "egeria": {"window": 2, "patience": 1, "tolerance": 0.5, "refresh": 3, "checks": 30},
    "simfreeze": {"tolerance": 0.3, "patience": 2},
}
"""Settings under which each policy freezes something in a short training (those that freeze at all)."""
_OURS = ("predictor/", "collect/", "data/")  # not the training loops of the tests


@dataclass(frozen=True)
class Row:
    """The most waits in one step of a kind."""

    what: str
    waits: int
    allowed: int
    places: tuple[str, ...]
    """Where they were in that step, with the reason."""

    def __str__(self) -> str:
        good = "ok" if self.waits <= self.allowed else "TOO MANY"
        lines = [f"{self.what:<44} {self.waits:>3} of {self.allowed:<3} {good}"]
        return "\n    ".join([*lines, *(self.places if good != "ok" else ())])


class Run:
    """A short training of the toy network under a policy, step by step.

    Args:
        policy: what decides.
        device: where it trains.
        moved: move the model to the device after the controller was made.
    """

    def __init__(self, policy: FreezePolicy, device: str = NAME, *, moved: bool = False) -> None:
        torch.manual_seed(0)
        self.device = device
        self.net = ToyNet() if moved else ToyNet().to(device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.policy = policy
        self.controller = FreezeController(self.net, self.optimizer, policy, total_steps=STEPS, say=None)
        self.net.to(device)
        self.done = 0

    @classmethod
    def under(cls, name: str, device: str = NAME, *, moved: bool = False) -> "Run":
        """A run under the policy called `name`, with settings under which it freezes something."""
        return cls(make_policy(name, **OPTIONS.get(name, {})), device, moved=moved)

    def step(self) -> str:
        """Take a step. Returns its kind: "ordinary", "a decision", "a change"."""
        torch.manual_seed(self.done)
        x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()
        event = self.controller.step()
        self.optimizer.zero_grad()
        self.done += 1
        return "a change" if event else "a decision" if self.policy.due(self.done, STEPS) else "ordinary"

    def frozen_by_step(self, steps: int = STEPS) -> list[list[int]]:
        """Train on, and return the frozen set after each step."""
        return [sorted(self.controller.frozen) for _ in range(steps) if self.step()]

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on."""
        parts = {"net": self.net, "optimizer": self.optimizer, "controller": self.controller}
        return {"done": self.done, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.done = state["done"]
        for name in ("net", "optimizer", "controller"):
            getattr(self, name).load_state_dict(state[name])


def table() -> list[Row]:
    """All rows. Takes about 20 seconds."""
    rows = [row for name in POLICIES for row in of_policy(name)]
    return [*rows, *of_collecting(), *of_cache()]


def of_policy(name: str) -> list[Row]:
    """A policy's waits in steps of each kind, those of forward passes included. The first step may count FLOPs."""
    with second_device() as syncs:
        run = Run.under(name)
        worst = _Worst()
        for _ in range(STEPS):
            syncs.clear()
            kind = run.step()
            worst.see(kind if run.done > 1 else "the first step", syncs)
    allowed = {"ordinary": 0, "a decision": 2, "a change": 2, "the first step": 2}
    return worst.rows(f"{name}: ", allowed)


def of_collecting() -> list[Row]:
    """Waits of what `collect` records beside a training."""
    spec, quiet = SampleSpec(weights=8, snapshots=6), SampleSpec(weights=8, snapshots=1)
    hooks: dict[str, tuple[Hook, SampleSpec]] = {
        "recorder: ": (Recorder(spec), spec),
        "CKA: ": (CKARecorder(spec, ProbeSpec(samples=8, features=32)), spec),
        "sieve: ": (Sieve(), quiet),
        "InfoBatch: ": (InfoBatch(), quiet),
    }
    rows = []
    for name, (hook, due) in hooks.items():
        watched = _Watched(hook, due)
        with second_device() as syncs:
            watched.syncs = syncs
            trained([watched], left_out=0.25 if isinstance(hook, Sieve) else 0.0)
        rows += watched.worst.rows(name, {"ordinary": 0, "a snapshot": 2, "an exchange": 2})
    return rows


def of_cache() -> list[Row]:
    """Waits of a batch whose features are known."""
    with second_device() as syncs:
        torch.manual_seed(0)
        run = Run(Script({0: [0, 1]}))
        cache = FeatureCache(run.controller)
        x, y = torch.randn(32, 1, 8, 8).to(NAME), torch.randint(3, (32,)).to(NAME)
        worst = _Worst()
        for number in range(20):
            ids = torch.arange(8) + number % 4 * 8
            x_B, y_B, hits = x[ids[0] :][:8], y[ids[0] :][:8], cache.hits
            syncs.clear()
            with cache.batch(ids):
                F.cross_entropy(run.net(x_B), y_B).backward()
            if cache.hits > hits:
                looked = any("cut_search" in place for place, _ in syncs)
                worst.see("a hit that is looked at again" if looked else "a hit", syncs)
    return worst.rows("cache: ", {"a hit": 1, "a hit that is looked at again": 5})


def trained(hooks: Sequence[Hook] = (), *, device: str = NAME, path: Path | None = None, **settings: Any) -> Training:
    """A short training of `collect` on a device that it would not choose."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("collect.training.loop.pick_device", torch.device))
        # A tensor on the second device is of a subclass, as one on a GPU is not.
        stack.enter_context(mock.patch("collect.training.checkpoint._check_plain"))
        workload = tiny_workload(TinyNet)
        return train(workload, seed=0, hooks=hooks, device=device, source=tiny_source(), checkpoint=path, **settings)


class _Worst:
    """Keeps the step with the most waits of each kind."""

    def __init__(self) -> None:
        self._waits: dict[str, int] = {}
        self._places: dict[str, tuple[str, ...]] = {}

    def see(self, kind: str, syncs: Syncs) -> None:
        """Note what was counted in a step."""
        found = syncs.of(*_OURS)
        if sum(found.values()) >= self._waits.get(kind, 0):
            self._waits[kind] = sum(found.values())
            self._places[kind] = tuple(f"{count} x {place} {why}" for (place, why), count in found.items())

    def rows(self, prefix: str, allowed: dict[str, int]) -> list[Row]:
        """One row a kind that was seen."""
        return [
            Row(prefix + kind, self._waits[kind], limit, self._places[kind])
            for kind, limit in allowed.items()
            if kind in self._waits
        ]


class _Watched(Hook):
    """Counts the waits within another hook's steps."""

    syncs: Syncs

    def __init__(self, hook: Hook, spec: SampleSpec) -> None:
        self._hook, self._spec = hook, spec
        self.worst = _Worst()

    def on_start(self, training: Training) -> None:
        self._hook.on_start(training)

    def on_step(self, training: Training) -> None:
        among = training.among
        before = Counter(self.syncs)
        self._hook.on_step(training)
        during = Syncs()
        during.update(Counter(self.syncs) - before)
        if isinstance(self._hook, Sieve | InfoBatch):
            kind = "ordinary" if training.among is among else "an exchange"
        else:
            kind = "a snapshot" if self._spec.due(training.step, training.total_steps) else "ordinary"
        self.worst.see(kind, during)

    def on_end(self, training: Training) -> None:
        self._hook.on_end(training)


def main() -> int:
    """Print the table. Returns 1 where there are more waits than allowed."""
    rows = table()
    print("\n".join(map(str, rows)))
    return int(any(row.waits > row.allowed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

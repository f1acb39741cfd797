"""One trial: a workload trained under a policy with a seed, and everything that the report wants to know of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from collect.device import pick_device
from collect.provenance import hardware, versions
from collect.train import Hook, Training, train
from collect.workloads import Workload, load_workload
from data.sources import load_source
from evaluate.cost import StepFlops, steps_by_pattern
from evaluate.stopwatch import PeakMemory, Stopwatch, warm_up
from predictor.errors import UsageError
from predictor.freezing.controller import FreezeController
from predictor.policies import make_policy
from predictor.policies.base import FreezePolicy


class FreezeHook(Hook):
    """Lets a policy freeze layers of the model under training."""

    controller: FreezeController

    def __init__(self, policy: FreezePolicy) -> None:
        self._policy = policy

    def on_start(self, training: Training) -> None:
        """Watch the training; a policy that freezes before the first step does so here."""
        self.controller = FreezeController(
            training.model,
            training.optimizer,
            self._policy,
            total_steps=training.total_steps,
            layers=training.layers,
        )

    def on_step(self, training: Training) -> None:
        """Let the policy judge."""
        self.controller.step()

    def on_end(self, training: Training) -> None:
        """Let go of what the policy holds."""
        self.controller.close()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the controller's state."""
        self.controller.load_state_dict(state)


def build_workload(name: str, source: str | None, recipe: Mapping[str, Any]) -> Workload:
    """The workload of a name with another source, where one is given, and with changes to its recipe."""
    try:
        workload = load_workload(name).with_recipe(**recipe)
    except TypeError as error:
        raise UsageError(f"workload {name!r} cannot be trained with {dict(recipe)}: {error}") from error
    return workload if source is None else replace(workload, source=source)


def run_trial(payload: dict[str, Any], folder: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Do one trial and return its line of results.jsonl.

    payload: `row`, the facts that are known beforehand and head the result; and what it takes to train: `workload`
        (arguments of `build_workload`), `policy` (name and options of `make_policy`), `seed` and `device`.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    workload = build_workload(**payload["workload"])
    source = load_source(workload.source, train_samples=workload.recipe.train_samples)
    policy = make_policy(payload["policy"]["name"], **payload["policy"]["options"])
    device = pick_device(payload["device"])
    warm_up(workload, source, device)
    freezing, stopwatch, memory = FreezeHook(policy), Stopwatch(), PeakMemory(device)
    training = train(
        workload,
        seed=payload["seed"],
        hooks=(freezing, stopwatch),
        device=payload["device"],
        budget=policy.budget,
        progress=lambda step, total: progress(step / total),
        source=source,
    )
    measured = {
        "peak_memory_bytes": memory.bytes,
        "peak_memory_note": memory.note,
        "step_cost": stopwatch.bins,
        **_outcome(training),
        **_freezing(freezing.controller, training),
    }
    facts = {"versions": versions(), "hardware": hardware(), "started": started}
    result: dict[str, Any] = finite({**payload["row"], **measured, **facts})
    return result


def finite(value: Any) -> Any:
    """`value` with every number that is not finite as None: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome(training: Training) -> dict[str, Any]:
    finished = training.status == "finished"
    last = training.curve[-1] if finished else {}
    lost = f"the loss was no longer a finite number after step {training.step} of {training.total_steps}"
    return {
        "status": training.status,
        "error": None if finished else lost,
        "accuracy": last.get("test_accuracy"),
        "loss": last.get("test_loss"),
        "train_seconds": training.train_seconds,
        "cpu_seconds": training.cpu_seconds,
        "steps": training.step,
        "planned_steps": max(1, round(training.recipe.epochs * training.steps_per_epoch)),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "curve": training.curve,
    }


def _freezing(controller: FreezeController, training: Training) -> dict[str, Any]:
    """What was frozen when, and the FLOPs that this leaves."""
    step_flops = StepFlops(training.workload, training.source)
    for event in controller.history:  # into the trial's log
        print(f"{event}: {step_flops(frozenset(event.frozen)) / step_flops(frozenset()):.0%} of a full step's FLOPs")
    steps = steps_by_pattern(controller.history, training.step)
    return {
        "policy_seconds": controller.seconds,
        "layers": [layer.name for layer in controller.layers],
        "freezes": [asdict(event) for event in controller.history],
        "patterns": [
            {"frozen": sorted(frozen), "step_flops": step_flops(frozen), "steps": count}
            for frozen, count in steps.items()
        ],
        "flops": sum(step_flops(frozen) * count for frozen, count in steps.items()),
    }

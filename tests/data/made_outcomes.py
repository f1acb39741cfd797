"""Small outcomes, whose runs and layers are those of `made_trajectory`, for the tests."""

from dataclasses import replace
from typing import Any

from data.outcomes.records import Outcome, Result

UNFROZEN = Result("finished", 0.5, 0.9, 0.4)


def made_outcome(kind: str = "front", step: int = 10, layers: tuple[int, ...] = (0, 1), **changes: Any) -> Outcome:
    """A continuation of the run mlp-0, of 40 steps and three layers, whose loss is 0.1 above the unfrozen run's."""
    parts: dict[str, Any] = {
        "run_id": "mlp-0",
        "workload": "mlp",
        "family": "mlp",
        "source": "digits",
        "seed": 0,
        "kind": kind,
        "step": step,
        "total_steps": 40,
        "layers": layers,
        "layer_names": tuple(f"layers.{index}" for index in layers),
        "layer_count": 3,
        "order_seed": 0,
        "flops_share": 0.5,
        "result": Result("finished", 0.6, 0.8, 0.45),
        "unfrozen": UNFROZEN,
    }
    return Outcome(**{**parts, **changes})


def ended(loss: float | None) -> Result:
    """The result of a training with this final loss. None: it diverged."""
    return Result("diverged") if loss is None else Result("finished", loss, 0.8, loss)


def made_run(run_id: str = "mlp-0", noise: float = 0.1, **losses: float | None) -> list[Outcome]:
    """A run with its noise and some frozen prefixes, with their losses: s10_2 for two layers frozen from step 10."""
    outcomes = [
        made_outcome("unfrozen", 0, (), result=UNFROZEN, facts={"choices": {}}),
        made_outcome("noise", 0, (), result=ended(0.5 + noise)),
        made_outcome("noise", 20, (), result=ended(0.5 - noise)),
    ]
    for name, loss in losses.items():
        step, count = map(int, name.removeprefix("s").split("_"))
        outcomes.append(made_outcome("front", step, tuple(range(count)), result=ended(loss)))
    return [replace(outcome, run_id=run_id) for outcome in outcomes]

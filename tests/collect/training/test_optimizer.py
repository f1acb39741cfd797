import math
from typing import Any

import pytest

from collect.training.optimizer import lr_share, make_optimizer, make_scheduler
from collect.workloads import Recipe
from tests.collect.tiny import TinyNet


def test_schedules_by_hand() -> None:
    recipe = Recipe(warmup=0.2)
    shares = [lr_share(step, 10, recipe) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[6] == pytest.approx(0.5)
    assert shares[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = [lr_share(step, 10, Recipe(warmup=0.2, schedule="linear")) for step in range(10)]
    assert linear == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    constant = [lr_share(step, 4, Recipe(warmup=0, schedule="constant")) for step in range(4)]
    assert constant == [1, 1, 1, 1]
    steps = [lr_share(step, 10, Recipe(warmup=0.2, schedule="steps")) for step in range(10)]
    assert steps == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("warmup", [0.0, 0.99])
def test_schedule_of_a_single_step(warmup: float) -> None:
    assert lr_share(0, 1, Recipe(warmup=warmup)) == 1.0


def shares(steps: int, **options: Any) -> list[float]:
    """The shares of the rate under a schedule of ten steps, in each of the first `steps`."""
    recipe = Recipe(lr=1.0, warmup=0.2, schedule="linear")
    optimizer = make_optimizer(TinyNet(), recipe)
    scheduler = make_scheduler(optimizer, recipe, 10, **options)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_a_cool_down_by_hand() -> None:
    # Of eight steps the last half: at step 4 the schedule stands at .75, and would be at zero in step 8.
    assert shares(8, end=8, cooldown=0.5) == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.5625, 0.375, 0.1875])
    assert shares(8, end=8) == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375])
    assert shares(4, end=4, cooldown=1.0) == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert shares(2, end=2, cooldown=0.2) == shares(2)  # not one step long


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_group_over_all_parameters_in_the_models_order(optimizer: Any) -> None:
    model = TinyNet()
    groups = make_optimizer(model, Recipe(optimizer=optimizer, lr=0.2, momentum=0.7, weight_decay=0.3)).param_groups
    assert len(groups) == 1
    assert [id(parameter) for parameter in groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (0.2, 0.3)
    assert groups[0].get("momentum", groups[0].get("betas")) in (0.7, (0.7, 0.999))

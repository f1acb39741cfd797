from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collect.training.loop import Hook, Training, train
from predictor import FreezeController
from predictor.policies import make_policy
from tests.collect.tiny import Losses, break_off, run, tiny_source, tiny_workload

TOTAL = 9
RECIPES = [
    {"accumulate": 2, "clip_norm": 0.5, "augment": True},
    {"accumulate": 2, "optimizer": "adamw", "lr": 0.01, "schedule": "linear", "label_smoothing": 0.1},
]


class Freezing(Hook):
    """A policy's controller as a hook."""

    def __init__(self, policy: str, **options: Any) -> None:
        self.policy = make_policy(policy, **options)

    def on_start(self, training: Training) -> None:
        self.controller = FreezeController(
            training.model, training.optimizer, self.policy, total_steps=training.total_steps
        )

    def on_step(self, training: Training) -> None:
        self.controller.step()

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if key not in ("clock", "train_seconds"):
                assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("recipe", "breaks_at"), [(RECIPES[0], 2), (RECIPES[1], 3), (RECIPES[1], 4), (RECIPES[0], 7), (RECIPES[0], TOTAL)]
)
def test_a_resumed_training_equals_the_unbroken_one_bit_for_bit(
    recipe: dict[str, Any], breaks_at: int, tmp_path: Path
) -> None:
    """Three steps an epoch: broken off in the middle of an epoch, at its end, and in the last step."""
    whole, resumed = Losses(), Losses()
    expected = run(whole, **recipe).state_dict()
    break_off(Losses(breaks_at), path=tmp_path / "checkpoint", **recipe)
    training = run(resumed, path=tmp_path / "checkpoint", **recipe)
    assert (training.status, training.step) == ("finished", TOTAL)
    assert_same(training.state_dict(), expected)
    assert resumed.losses == whole.losses


def test_it_resumes_and_does_not_start_over(tmp_path: Path) -> None:
    break_off(Losses(12), path=tmp_path / "checkpoint")
    reported: list[int] = []
    train(
        tiny_workload(),
        seed=0,
        hooks=[Losses()],
        device="cpu",
        checkpoint=tmp_path / "checkpoint",
        progress=lambda step, total: reported.append(step),
        source=tiny_source(),
    )
    assert reported == list(range(12, 19))  # step 12 was broken off before it could be saved


@pytest.mark.parametrize(
    ("policy", "options", "optimizer"),
    [("static", {"layers": 1}, "sgd"), ("linear", {"start": 0.2}, "adamw"), ("shorter", {}, "sgd")],
)
def test_frozen_layers_resume(policy: str, options: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    recipe = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1}
    whole, resumed = Freezing(policy, **options), Freezing(policy, **options)
    expected = run(Losses(), whole, **recipe).state_dict()
    break_off(Losses(11), Freezing(policy, **options), path=tmp_path / "checkpoint", **recipe)
    assert_same(run(Losses(), resumed, path=tmp_path / "checkpoint", **recipe).state_dict(), expected)
    assert resumed.controller.history == whole.controller.history
    assert resumed.controller.frozen == whole.controller.frozen


def test_a_stopped_training_resumes(tmp_path: Path) -> None:
    class Stop(Hook):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step(self, training: Training) -> None:
            if training.step == self.step:
                training.stop("enough")

    expected = run(Stop(-1)).state_dict()
    for step in (8, 12):
        stopped = run(Stop(step), path=tmp_path / "checkpoint", seconds=1e9)
        assert (stopped.status, stopped.step) == ("stopped", step)
    assert_same(run(Stop(-1), path=tmp_path / "checkpoint").state_dict(), expected)


def test_seconds_add_up(tmp_path: Path) -> None:
    class Late(Losses):
        def on_start(self, training: Training) -> None:
            training.clock._seconds = [50.0, 40.0]

    break_off(Late(9), path=tmp_path / "checkpoint")
    training = run(Late(), path=tmp_path / "checkpoint")
    assert 50 < training.train_seconds < 60
    assert 40 < training.cpu_seconds < 50
    assert [row["train_seconds"] >= 50 for row in training.curve] == [True] * 3

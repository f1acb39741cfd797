"""Whole trainings with sparse masks: zero stays zero, with any policy, and they resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collect.hooks.sparse_masks import SparseMasks
from collect.training.loop import Hook, Training, train
from predictor.policies.base import FreezePolicy, View
from tests.collect.hooks.test_sparse_masks import MASKED, Deep, begun
from tests.collect.tiny import AtStep, BrokenOff, Losses, Trace, tiny_source, tiny_train, tiny_workload
from tests.collect.training.test_resume import Freezing, assert_same

HELD = [101, 25, 1792]
"""Of 144, 36 and 2560 weights 43, 11 and 768 are active at a sparsity of 0.7."""


def largest_held(training: Training, masks: SparseMasks) -> float:
    return max(training.model.get_parameter(name)[held].abs().max().item() for name, held in masks.masked.items())


@pytest.mark.parametrize(
    "recipe",
    [
        {"momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
        {"momentum": 0.9, "accumulate": 2, "clip_norm": 0.1, "channels_last": False},
    ],
)
def test_masked_weights_are_zero_after_each_step_and_their_number_stays(recipe: dict[str, Any]) -> None:
    def largest_state(training: Training) -> float:
        values = [
            value[masks.masked[name]]
            for name in MASKED
            for value in training.optimizer.state.get(training.model.get_parameter(name), {}).values()
            if isinstance(value, Tensor) and value.shape == training.model.get_parameter(name).shape
        ]
        return max((value.abs().max().item() for value in values), default=0.0)

    masks = SparseMasks(0.7, moved=0.5)
    weights = Trace(lambda training: largest_held(training, masks))
    state = Trace(largest_state)
    count = Trace(lambda training: [int(held.sum()) for held in masks.masked.values()])
    training = tiny_train((masks, weights, state, count), net=Deep, epochs=6, **recipe)
    assert masks.changes == 4  # after epochs 1 to 4; 5 of 6 is beyond three quarters
    assert weights.at("step") == state.at("step") == [0.0] * training.step
    assert count.at("step") == [HELD] * training.step
    active = [training.model.get_parameter(name)[~held] for name, held in masks.masked.items()]
    assert all((weight != 0).float().mean() > 0.8 for weight in active)  # a quarter was grown, and has moved


def test_masked_weights_have_no_gradient() -> None:
    """Neither for the clipping that comes before a step, nor for what other hooks read after it."""

    class Gradients(Hook):
        def on_step(self, training: Training) -> None:
            for name, held in masks.masked.items():
                gradient = training.model.get_parameter(name).grad
                assert gradient is not None
                assert (gradient[held] == 0).all()
                assert (gradient[~held] != 0).any()

    masks = SparseMasks(0.7)
    tiny_train((Gradients(), masks), net=Deep, epochs=2, clip_norm=0.1)
    assert masks.changes == 1


def test_afterwards_gradients_pass_again() -> None:
    masks = SparseMasks(0.7)
    training = tiny_train((masks,), net=Deep, epochs=1)
    training.model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    gradient = training.model.get_parameter("dense.weight").grad
    assert gradient is not None
    assert (gradient[masks.masked["dense.weight"]] != 0).any()


def test_without_moving_the_masks_of_the_start_stay() -> None:
    masks = SparseMasks(0.7, moved=0.0)
    tiny_train((masks,), net=Deep)
    assert_same(masks.masked, begun(Deep, 0.7)[1].masked)
    assert masks.changes == 0


def test_frozen_layers_keep_weights_and_masks() -> None:
    """Three of four layers freeze with the last step of the first epoch, just before the masks change."""

    class FrontFrom(FreezePolicy):
        def decide(self, view: View) -> frozenset[int]:
            return frozenset({0, 1, 2} if view.step >= 6 else ())

    freezing, masks, start = Freezing("none"), SparseMasks(0.7, moved=0.5), begun(Deep, 0.7)[1]
    freezing.policy = FrontFrom()
    weights = Trace(lambda training: {name: training.model.get_parameter(name).detach().clone() for name in MASKED})
    training = tiny_train((masks, freezing, weights), net=Deep, epochs=4)
    for name in ("second.weight", "depthwise.weight"):
        assert torch.equal(masks.masked[name], start.masked[name])
        assert torch.equal(training.model.get_parameter(name), weights.at("step")[5][name])
    assert not torch.equal(masks.masked["dense.weight"], start.masked["dense.weight"])
    assert masks.changes == 2


@pytest.mark.parametrize(
    ("policy", "options"), [("static", {"layers": 2}), ("gradual", {}), ("freezeout", {}), ("spfde", {"target": 0.9})]
)
def test_masks_hold_under_policies_that_freeze_unfreeze_and_change_rates(policy: str, options: dict[str, Any]) -> None:
    freezing, masks = Freezing(policy, **options), SparseMasks(0.7)
    weights = Trace(lambda training: largest_held(training, masks))
    training = tiny_train((masks, freezing, weights), net=Deep, epochs=6)
    assert freezing.controller.history
    assert weights.at("step") == [0.0] * training.step
    assert [int(held.sum()) for held in masks.masked.values()] == HELD


def test_weights_that_stand_still_from_the_start_are_left_alone() -> None:
    def still(training: Training) -> None:
        training.model.get_parameter("dense.weight").requires_grad_(False)

    masks = SparseMasks(0.5)
    training = tiny_train((AtStep(0, still), masks), net=Deep)
    assert list(masks.masked) == MASKED[:2]
    assert (training.model.get_parameter("dense.weight") != 0).all()


def run(*hooks: Hook, path: Path | None = None, **recipe: Any) -> Training:
    """Four epochs of six steps."""
    return train(
        tiny_workload(Deep, epochs=4, **recipe),
        seed=0,
        hooks=hooks,
        device="cpu",
        checkpoint=path,
        checkpoint_seconds=0,
        source=tiny_source(),
    )


@pytest.mark.parametrize(("breaks_at", "optimizer"), [(7, "sgd"), (14, "adamw")])
def test_a_sparse_training_resumes_bit_for_bit(breaks_at: int, optimizer: str, tmp_path: Path) -> None:
    """Broken off in the step in which the masks first change, and after their second change."""
    recipe = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.1}
    masks, freezing = SparseMasks(0.7), Freezing("linear", start=0.4)
    expected = run(masks, freezing, Losses(), **recipe).state_dict()
    path = tmp_path / "checkpoint"
    with pytest.raises(BrokenOff):
        run(SparseMasks(0.7), Freezing("linear", start=0.4), Losses(breaks_at), path=path, **recipe)
    resumed, refreezing = SparseMasks(0.7), Freezing("linear", start=0.4)
    training = run(resumed, refreezing, Losses(), path=path, **recipe)
    assert_same(training.state_dict(), expected)
    assert_same(resumed.state_dict(), masks.state_dict())
    assert masks.changes == 2
    assert refreezing.controller.history == freezing.controller.history != []

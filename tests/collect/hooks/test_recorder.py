import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collect.hooks.recorder import Recorder
from collect.training.loop import Hook, Training, train
from predictor.layers.layer import layers_of
from predictor.model.sampling import LayerSampler, SampleSpec
from predictor.policies.measuring.gradients import gradient_norms
from tests.collect.tiny import TinyNet, tiny_source, tiny_workload

STEPS = 18  # of the tiny workload


def tiny_train(*hooks: Hook, seed: int = 0, **settings: Any) -> Training:
    options = {name: settings.pop(name) for name in ("checkpoint", "checkpoint_seconds") if name in settings}
    workload = tiny_workload(**settings)
    return train(workload, seed=seed, hooks=hooks, device="cpu", source=tiny_source(), **options)


class Whole(Hook):
    """The plain twin: keeps whole layers, before the training and after every step."""

    def on_start(self, training: Training) -> None:
        self.weights = [self._layers(training)]
        self.gradients: list[list[Tensor]] = [[]]
        self.losses = [math.nan]
        self.lr = [training.lr]

    def on_step(self, training: Training) -> None:
        self.weights.append(self._layers(training))
        self.gradients.append([torch.cat([p.grad.flatten().clone() for p in layer.own]) for layer in training.layers])
        self.losses.append(training.loss.item())
        self.lr.append(training.lr)

    def _layers(self, training: Training) -> list[Tensor]:
        return [torch.cat([p.detach().flatten().clone() for p in layer.own]) for layer in training.layers]


def test_every_row_against_whole_layers() -> None:
    recorder, whole = Recorder(SampleSpec(weights=10_000, snapshots=6)), Whole()
    tiny_train(recorder, whole)
    fields = recorder.fields()
    assert fields["step_T"].tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert fields["layer_names"] == ("conv", "linear")
    assert fields["layer_sizes_L"].tolist() == [4 * 9 + 4 + 8, 8 * 256 + 8]
    assert fields["weights_TLK"].shape == (7, 2, 10_000)
    for row, step in enumerate(fields["step_T"]):
        assert fields["lr_T"][row] == whole.lr[step]
        if step == 0:
            assert np.isnan(fields["loss_T"][0])
            assert np.isnan(fields["gradient_norm_TL"][0]).all()
            continue
        assert fields["loss_T"][row] == pytest.approx(np.mean(whole.losses[step - 2 : step + 1]), rel=1e-6)
        norms = [gradient.norm().item() for gradient in whole.gradients[step]]
        assert fields["gradient_norm_TL"][row] == pytest.approx(norms, rel=1e-5)
    assert (np.diff(fields["seconds_T"]) > 0).all()


def test_a_recording_by_hand() -> None:
    """A linear layer of 4 weights, all sampled once."""
    training = Steps(nn.Linear(2, 2, bias=False), total_steps=4)
    recorder = Recorder(SampleSpec(weights=4, snapshots=2))
    recorder.on_start(training)  # type: ignore[arg-type]
    for move in ([3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [9.0, 9.0, 9.0, 9.0], [3.0, 4.0, 0.0, 0.0]):
        training.move(move)
        recorder.on_step(training)  # type: ignore[arg-type]
    fields = recorder.fields()
    assert fields["step_T"].tolist() == [0, 2, 4]
    assert fields["loss_T"][1:].tolist() == [1.5, 3.5]
    assert sorted(fields["weights_TLK"][2, 0].tolist()) == [9.0, 11.0, 15.0, 17.0]


def test_positions_stay_the_same_through_the_run() -> None:
    recorder, whole = Recorder(SampleSpec(weights=8, snapshots=3)), Whole()
    training = tiny_train(recorder, whole)
    sampler = LayerSampler(training.layers, recorder.spec)
    assert torch.equal(torch.from_numpy(recorder.fields()["weights_TLK"][-1]), sampler.sample_all())
    first = recorder.fields()["weights_TLK"]
    for column in range(8):
        series = first[:, 1, column]
        whole_T4 = torch.stack([whole.weights[step][1] for step in (0, 6, 12, 18)]).numpy()
        assert any((whole_T4[:, place] == series).all() for place in range(whole_T4.shape[1]))


def test_gradient_norms_of_a_frozen_layer_and_of_several_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    layers = layers_of(model)
    model[0].weight.grad = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    model[0].bias.grad = torch.tensor([4.0, 0.0])
    norm_L = gradient_norms(layers)
    assert norm_L[0].item() == 5.0
    assert math.isnan(norm_L[1].item())


def test_recording_changes_no_number_of_the_training() -> None:
    with_recorder, without = tiny_train(Recorder(SampleSpec(weights=8))), tiny_train()
    for ours, theirs in zip(with_recorder.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert with_recorder.curve[-1]["test_loss"] == without.curve[-1]["test_loss"]


class Stop(Hook):
    def on_step(self, training: Training) -> None:
        if training.step == self.step:
            training.stop("enough")

    def __init__(self, step: int) -> None:
        self.step = step


@pytest.mark.parametrize("step", [1, 5, 6, 17])
def test_a_broken_off_recording_goes_on_exactly(tmp_path: Path, step: int) -> None:
    spec, file = SampleSpec(weights=8, snapshots=6), tmp_path / "checkpoint.pt"
    whole = Recorder(spec)
    tiny_train(whole, Stop(0))
    tiny_train(Recorder(spec), Stop(step), checkpoint=file, checkpoint_seconds=1e9)
    resumed = Recorder(spec)
    assert tiny_train(resumed, Stop(0), checkpoint=file, checkpoint_seconds=1e9).status == "finished"
    ours, theirs = resumed.fields(), whole.fields()
    for name in ours:
        if name != "seconds_T":
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert (np.diff(ours["seconds_T"]) > 0).all()


def test_a_run_that_diverges_keeps_its_rows() -> None:
    recorder = Recorder(SampleSpec(weights=8, snapshots=6))
    training = tiny_train(recorder, lr=1e30, warmup=0.0)
    assert training.status == "diverged"
    assert recorder.fields()["step_T"].tolist()[0] == 0
    assert len(recorder.fields()["weights_TLK"]) == len(recorder.fields()["step_T"]) < 7


def test_a_second_training_starts_a_new_recording() -> None:
    recorder = Recorder(SampleSpec(weights=8, snapshots=6))
    for _ in range(2):
        tiny_train(recorder)
    assert len(recorder.fields()["step_T"]) == 7


class Steps:
    """A training whose steps are made by hand: one layer, and a head that is not recorded."""

    def __init__(self, module: nn.Module, total_steps: int) -> None:
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        self.layers = layers_of(nn.Sequential(module, nn.Linear(2, 1)))
        self.device = torch.device("cpu")
        self.total_steps = total_steps
        self.step = 0
        self.lr = 0.1

    @property
    def loss(self) -> Tensor:
        return torch.tensor(float(self.step))

    @property
    def train_seconds(self) -> float:
        return float(self.step)

    def move(self, change: list[float]) -> None:
        weight = self.layers[0].own[0]
        with torch.no_grad():
            weight += torch.tensor(change).view_as(weight)
        self.step += 1


def test_the_tiny_net_is_what_these_tests_take_it_for() -> None:
    assert [layer.name for layer in layers_of(TinyNet())] == ["conv", "linear"]

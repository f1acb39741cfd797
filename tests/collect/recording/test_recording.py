"""A recording of one's own loop: the same numbers as gathering gives, resumed without loss, whole or not at all."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from collect.hooks.cka import CKARecorder, ProbeSpec
from collect.hooks.recorder import Recorder
from collect.recording import Recording
from collect.training.loop import Hook, Training
from data.trajectories import Trajectory, open_trajectories
from data.trajectories.merge import merge
from predictor import FreezeController
from predictor.errors import FileFault, UsageError
from predictor.model.sampling import SampleSpec
from tests.collect.tiny import TinyNet, tiny_train
from tests.predictor.scripted import Script

SPEC = SampleSpec(weights=16, snapshots=6)
STEPS = 12
PROBE = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(5))


class Loop:
    """A training as anybody writes it: AdamW, a schedule, accumulated gradients."""

    def __init__(self, out: Path, *, accumulate: int = 1, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.net = TinyNet()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / STEPS)
        self.accumulate = accumulate
        settings = {"total_steps": STEPS, "out": out, "probe": PROBE, "sampling": SPEC, **options}
        self.recording = Recording(self.net, self.optimizer, **settings)

    def step(self, number: int) -> None:
        total = torch.zeros(())
        for part in range(self.accumulate):
            torch.manual_seed(100 * number + part)
            loss = F.cross_entropy(self.net(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0])) / self.accumulate
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.schedule.step()
        self.recording.step(total)
        self.optimizer.zero_grad()

    def run(self, first: int = 0, last: int = STEPS) -> "Loop":
        for number in range(first, last):
            self.step(number)
        return self

    def state(self) -> dict[str, Any]:
        """As it comes out of a checkpoint."""
        file = io.BytesIO()
        parts = {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule, "recording": self.recording}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state: dict[str, Any]) -> None:
        for name in ("net", "optimizer", "schedule", "recording"):
            getattr(self, name).load_state_dict(state[name])


def only_run(path: Path | None) -> Trajectory:
    assert path is not None
    with open_trajectories(path) as file:
        (run,) = list(file)
    return run


def assert_equal(ours: Trajectory, theirs: Trajectory) -> None:
    for name in ("layer_names", "layer_sizes_L", "step_T", "lr_T", "loss_T", "weights_TLK"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    for name in ("gradient_norm_TL", "similarity_TL"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5, err_msg=name)


class Own(Hook):
    """Records the toolkit's own training as somebody else's."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_start(self, training: Training) -> None:
        self.recording = Recording(
            training.model,
            training.optimizer,
            total_steps=training.total_steps,
            out=self.out,
            probe=training.source.probe(9),
            layers=training.layers,
            sampling=SPEC,
        )

    def on_step(self, training: Training) -> None:
        self.recording.step(training.loss)


def test_it_is_what_gathering_records(tmp_path: Path) -> None:
    own, recorder, similarity = Own(tmp_path / "own.h5"), Recorder(SPEC), CKARecorder(SPEC, ProbeSpec(samples=9))
    training = tiny_train((own, recorder, similarity))
    run = only_run(own.recording.finish(accuracy=0.9, loss=0.3))
    fields = recorder.fields()
    for name in ("layer_names", "layer_sizes_L", "step_T", "lr_T", "loss_T", "weights_TLK", "gradient_norm_TL"):
        np.testing.assert_array_equal(getattr(run, name), fields[name])
    np.testing.assert_array_equal(run.similarity_TL, similarity.similarity_TL)
    assert run.finished
    assert (run.outcome["final_accuracy"], run.outcome["final_loss"]) == (0.9, 0.3)
    assert run.config["total_steps"] == training.total_steps


def test_recording_changes_no_number_of_the_training(tmp_path: Path) -> None:
    class Nothing(Hook):
        pass

    with_it, without = tiny_train((Own(tmp_path),)), tiny_train((Nothing(),))
    for ours, theirs in zip(with_it.model.state_dict().values(), without.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_rate_is_that_of_the_step_though_the_schedule_has_gone_on(tmp_path: Path) -> None:
    run = only_run(Loop(tmp_path).run().recording.finish())
    assert run.lr_T == pytest.approx([0.01 * (1 - max(step - 1, 0) / STEPS) for step in run.step_T])


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_resumed_equals_unbroken(tmp_path: Path, stop: int) -> None:
    unbroken = only_run(Loop(tmp_path / "whole").run().recording.finish())
    broken = Loop(tmp_path / "run").run(last=stop)
    state = broken.state()
    broken.run(first=stop, last=stop + 1)  # what came after the checkpoint is done again
    resumed = Loop(tmp_path / "run", seed=1, probe=torch.randn(6, 1, 8, 8))  # a loader that shuffles
    resumed.load(state)
    assert resumed.recording.run_id == broken.recording.run_id
    assert_equal(only_run(resumed.run(first=stop).recording.finish()), unbroken)


def test_a_state_in_memory_does_not_change_when_the_training_goes_on(tmp_path: Path) -> None:
    loop = Loop(tmp_path).run(last=5)
    state = loop.recording.state_dict()
    before = copy.deepcopy(state)
    loop.run(first=5)
    assert torch.equal(state["recorder"]["tensors"]["loss_sum"], before["recorder"]["tensors"]["loss_sum"])
    assert state["recorder"]["step"] == before["recorder"]["step"]
    assert len(state["similarity"]["triangles"]) == len(before["similarity"]["triangles"])


def test_a_training_that_breaks_leaves_no_file(tmp_path: Path) -> None:
    loop = Loop(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), loop.run(last=9).recording:
        interrupt()
    assert not list(tmp_path.rglob("*.h5*"))
    whole = Loop(tmp_path)
    with whole.recording as recording:
        whole.run()
    assert recording.path.exists()
    assert not whole.optimizer._optimizer_step_post_hooks
    assert not loop.optimizer._optimizer_step_post_hooks


def test_of_gradients_of_several_batches_the_sum_is_recorded(tmp_path: Path) -> None:
    loop = Loop(tmp_path, accumulate=3)
    norms = []
    for number in range(STEPS):
        loop.optimizer.zero_grad = lambda: norms.append(  # type: ignore[method-assign]
            torch.cat([p.grad.flatten() for p in loop.recording.layers[1].own]).norm().item()
        )
        loop.step(number)
        torch.optim.Optimizer.zero_grad(loop.optimizer)
    run = only_run(loop.recording.finish())
    assert run.step_T.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert run.gradient_norm_TL[1:, 1] == pytest.approx(norms[1::2], rel=1e-5)


def test_a_run_without_losses_and_figures_is_sound(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    step = loop.recording.step
    loop.recording.step = lambda loss: step()  # type: ignore[method-assign, assignment]
    run = only_run(loop.run().recording.finish())
    assert run.finished
    assert run.outcome["final_accuracy"] is None
    assert np.isnan(run.loss_T).all()


def test_a_run_that_diverges_is_kept_as_one(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run(last=8)
    with torch.no_grad():
        loop.net.conv.weight.fill_(float("nan"))
    run = only_run(loop.run(first=8).recording.finish())
    assert run.outcome["status"] == "diverged"
    assert np.isnan(run.similarity_TL).all()


def test_more_steps_than_planned_are_left_out_with_one_warning(tmp_path: Path) -> None:
    loop = Loop(tmp_path).run()
    with pytest.warns(UserWarning, match="total_steps=12") as found:
        loop.run(first=STEPS, last=STEPS + 4)
    assert len(found) == 1
    assert only_run(loop.recording.finish()).step_T[-1] == STEPS


def test_a_training_that_ends_early_is_recorded_up_to_its_last_snapshot(tmp_path: Path) -> None:
    loop = Loop(tmp_path).run(last=9)
    with pytest.warns(UserWarning, match="step 9 of total_steps=12"):
        run = only_run(loop.recording.finish())
    assert run.finished
    assert run.step_T.tolist() == [0, 2, 4, 6, 8]
    assert run.similarity_TL[-1] == pytest.approx([1.0, 1.0])


def test_gradients_that_are_gone_are_noticed(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.recording.step, step = loop.optimizer.zero_grad, loop.recording.step  # type: ignore[method-assign, assignment]
    loop.recording.step = lambda loss: (loop.optimizer.zero_grad(), step(loss))  # type: ignore[method-assign, assignment, func-returns-value]
    with pytest.warns(UserWarning, match=r"before optimizer.zero_grad\(\)"):
        loop.run()


def test_an_accuracy_in_percent_does_not_lose_the_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path).run()
    with pytest.warns(UserWarning, match="accuracy=93"):
        assert only_run(loop.recording.finish(accuracy=93.0)).outcome["final_accuracy"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": None}, "total_steps=None"),
        ({"total_steps": float("inf")}, "total_steps=inf"),
        ({"total_steps": 2.5}, "total_steps=2.5"),
        ({"probe": PROBE[:3]}, "at least 4 samples"),
        ({"probe": [1, 2]}, "0 samples"),
        ({"probe": PROBE[:, :, :3]}, r"TinyNet cannot be called on it .*call="),
        ({"probe": torch.zeros(8, 1, 8, 8)}, "different samples"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Loop(tmp_path, **options)


@pytest.mark.parametrize("number", [np.int64(STEPS), float(STEPS), torch.tensor(STEPS)])
def test_total_steps_may_be_any_whole_number(tmp_path: Path, number: Any) -> None:
    run = only_run(Loop(tmp_path, total_steps=number).run().recording.finish())
    assert run.config["total_steps"] == STEPS


def test_no_older_file_is_lost(tmp_path: Path) -> None:
    Loop(tmp_path / "one.h5").run().recording.finish()
    with pytest.raises(UsageError, match="exists"):
        Loop(tmp_path / "one.h5")
    assert Loop(tmp_path / "one.h5", replace=True).run().recording.finish() == tmp_path / "one.h5"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFault, match="cannot be made"):
        Loop(tmp_path / "file")


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    state = Loop(tmp_path).recording.state_dict()
    with pytest.raises(UsageError, match="total_steps=12"):
        Loop(tmp_path, total_steps=13).recording.load_state_dict(state)
    with pytest.raises(UsageError, match="layers="):
        Loop(tmp_path).recording.load_state_dict({**state, "layers": ["conv"]})


class Named(nn.Module):
    """Takes named inputs, one of which it pops, and answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, options: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = options.pop("scale")
        return {"logits": self.head(self.linear(self.embedding(tokens)).mean(dim=1) * scale)}


@pytest.mark.parametrize(
    ("probe", "call"),
    [
        ({"tokens": torch.arange(24).view(6, 4) % 9, "options": {"scale": torch.ones(6, 1)}}, None),
        ((torch.arange(24).view(6, 4) % 9, {"scale": torch.ones(6, 1)}), None),
        (torch.arange(24).view(6, 4) % 9, lambda model, batch: model(batch, {"scale": 1.0})),
    ],
)
def test_models_of_all_calls(tmp_path: Path, probe: Any, call: Callable[[nn.Module, Any], object] | None) -> None:
    net = Named()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    names = {"workload": "tagger", "family": "tokens", "source": "mine", "seed": 3}
    recording = Recording(
        net, optimizer, total_steps=2, out=tmp_path, probe=probe, call=call, recipe={"batch_size": 6}, **names
    )
    for _ in range(2):
        loss = net(torch.arange(24).view(6, 4) % 9, {"scale": torch.ones(6, 1)})["logits"].square().mean()
        loss.backward()
        optimizer.step()
        recording.step(loss)
        optimizer.zero_grad()
    run = only_run(recording.finish())
    assert run.layer_names == ("embedding", "linear")
    assert {name: run.config[name] for name in names} == names
    assert run.config["recipe"] == {"optimizer": "SGD", "lr": 0.1, "batch_size": 6}
    assert np.isfinite(run.similarity_TL).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(8, 4).to(dtype)
    recording = Recording(net, optimizer, total_steps=2, out=tmp_path, probe=x)
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
        recording.step(1.0)
        optimizer.zero_grad()
    assert np.isfinite(only_run(recording.finish()).similarity_TL).all()


def test_under_autocast_the_call_says_so(tmp_path: Path) -> None:
    seen = []

    def call(model: nn.Module, batch: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            answer = model(batch)
        seen.append(answer.dtype)
        return answer

    assert np.isfinite(only_run(Loop(tmp_path, call=call).run().recording.finish()).similarity_TL).all()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("order", [1, -1])
def test_wrapped_models_and_several_optimizers_in_any_order(tmp_path: Path, order: int) -> None:
    net = TinyNet()
    parts = ((net.conv, 0.1), (net.head, 0.2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=rate) for part, rate in parts][::order]
    recording = Recording(
        torch.compile(nn.DataParallel(net), backend="eager"), optimizers, total_steps=2, out=tmp_path, probe=PROBE
    )
    for _ in range(2):
        net(PROBE).sum().backward()
        recording.step()
    run = only_run(recording.finish())
    assert run.layer_names == ("conv", "linear")
    assert run.lr_T.tolist() == [0.1] * 3


def test_beside_a_controller_that_freezes(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    controller = FreezeController(loop.net, loop.optimizer, Script({6: {0}}), total_steps=STEPS, say=None)
    for number in range(STEPS):
        loop.step(number)
        controller.step()
    run = only_run(loop.recording.finish())
    assert controller.frozen == {0}
    assert (run.weights_TLK[-1, 0] == run.weights_TLK[-2, 0]).all()
    assert np.isnan(run.gradient_norm_TL[-1, 0])


def test_runs_of_ones_own_and_of_the_toolkit_are_merged(tmp_path: Path) -> None:
    for _ in range(2):
        Loop(tmp_path / "own").run().recording.finish()
    merged = merge([tmp_path / "own"], tmp_path / "all.h5")
    assert merged.runs == 2


def test_the_first_of_several_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path).run()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert loop.recording.finish() is None
    assert not list(tmp_path.rglob("*.h5"))


def test_a_probe_of_many_samples_is_cut(tmp_path: Path) -> None:
    run = only_run(Loop(tmp_path, probe=torch.randn(300, 1, 8, 8)).run().recording.finish())
    assert run.config["probe"]["samples"] == 128


@pytest.mark.parametrize(
    "probe", [(PROBE, torch.zeros(8)), [PROBE, torch.zeros(8)], {"x_BCHW": PROBE, "labels": torch.zeros(8)}]
)
def test_labels_in_the_probe_are_left_out(tmp_path: Path, probe: Any) -> None:
    broken = Loop(tmp_path / "own", probe=probe).run(last=5)
    resumed = Loop(tmp_path / "own", probe=probe, seed=1)
    resumed.load(broken.state())
    run = only_run(resumed.run(first=5).recording.finish())
    assert_equal(run, only_run(Loop(tmp_path / "plain").run().recording.finish()))


def test_the_probe_is_not_the_users_tensor(tmp_path: Path) -> None:
    reused = PROBE.clone()
    loop = Loop(tmp_path / "one", probe=reused)
    reused.zero_()
    assert_equal(only_run(loop.run().recording.finish()), only_run(Loop(tmp_path / "other").run().recording.finish()))


class Detector(nn.Module):
    """Takes a list of images, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        pooled = torch.stack([self.conv(image[None]).mean(dim=(0, 2, 3)) for image in images])
        answer: Tensor = self.head(self.linear(pooled))
        return answer


def test_a_detector_takes_a_list_of_images(tmp_path: Path) -> None:
    net = Detector()
    images = [torch.rand(3, 5 + index, 6) for index in range(5)]
    recording = Recording(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=1, out=tmp_path, probe=images)
    net(images).sum().backward()
    recording.step()
    run = only_run(recording.finish())
    assert run.config["probe"]["samples"] == 5
    assert np.isfinite(run.similarity_TL[:, 1]).all()

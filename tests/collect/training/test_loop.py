import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from collect.training.loop import Hook, Training, train
from predictor.errors import UsageError
from tests.collect.tiny import AtStep, PlainNet, Trace, same, tiny_source, tiny_train, tiny_workload, weights


def freeze_convolution(training: Training) -> None:
    for parameter in training.model.get_submodule("conv").parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def test_learns() -> None:
    training = tiny_train(epochs=10)
    assert training.status == "finished"
    assert training.curve[-1]["test_accuracy"] == 1.0
    assert training.curve[-1]["test_loss"] < 0.5 < training.curve[0]["test_loss"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_seed_decides_every_bit(optimizer: str) -> None:
    one, other = (tiny_train(augment=True, optimizer=optimizer, lr=0.01) for _ in range(2))
    assert same(weights(one), weights(other))
    assert [row["test_loss"] for row in one.curve] == [row["test_loss"] for row in other.curve]
    assert not same(weights(one), weights(tiny_train(augment=True, optimizer=optimizer, lr=0.01, seed=1)))


def test_earlier_random_numbers_and_reading_hooks_change_nothing() -> None:
    expected = weights(tiny_train())
    torch.rand(7)
    assert same(expected, weights(tiny_train((Trace(lambda training: training.loss.item()),))))


def test_hooks_come_in_the_order_that_the_docstring_promises() -> None:
    trace = Trace(lambda training: (training.step, len(training.curve), training.status))
    tiny_train((trace,), epochs=2, batch_size=12)
    assert trace.calls == [
        ("start", (0, 0, "running")),
        ("step", (1, 0, "running")),
        ("step", (2, 0, "running")),
        ("epoch", (2, 1, "running")),
        ("step", (3, 1, "running")),
        ("step", (4, 1, "running")),
        ("epoch", (4, 2, "running")),
        ("end", (4, 2, "finished")),
    ]


def test_gradients_stand_in_on_step_and_are_none_afterwards() -> None:
    trace = Trace(lambda training: [parameter.grad is not None for parameter in training.model.parameters()])
    tiny_train((trace,))
    assert all(all(present) for present in trace.at("step"))
    assert not any(any(present) for present in trace.at("epoch"))


def test_lr_in_a_hook_is_that_of_the_step_just_taken() -> None:
    trace = Trace(lambda training: training.lr)
    tiny_train((trace,), epochs=1, warmup=0.5, schedule="linear", lr=0.06)
    assert trace.at("start") == [pytest.approx(0.02)]
    assert trace.at("step") == pytest.approx([0.02, 0.04, 0.06, 0.06, 0.04, 0.02])
    assert trace.at("epoch") == [pytest.approx(0.02)]


def test_budget_rescales_steps_and_schedule() -> None:
    trace = Trace(lambda training: training.lr)
    training = tiny_train((trace,), epochs=4, budget=0.5, warmup=0.25, schedule="linear", lr=1.0, net=PlainNet)
    assert (training.step, training.total_steps) == (12, 12)
    assert trace.at("step") == pytest.approx([1 / 3, 2 / 3, 1, *(share / 9 for share in range(9, 0, -1))])


def test_the_smallest_budget_is_one_step() -> None:
    assert tiny_train(budget=1e-6).step == 1


@pytest.mark.parametrize("budget", [0, 1.5, math.nan])
def test_impossible_budget(budget: float) -> None:
    with pytest.raises(UsageError, match=f"budget={budget}: give a share"):
        tiny_train(budget=budget)


# Freezing


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(4, classes)
            self.second = nn.Linear(4, 4)
            self.first = nn.Linear(64, 4)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            logits: Tensor = self.head(self.second(self.first(x_BCHW.flatten(1))))
            return logits

    training = tiny_train((Trace(lambda training: training.layers),), net=Backwards)
    assert [layer.name for layer in training.layers] == ["first", "second"]
    assert same(weights(training), weights(tiny_train(net=Backwards)))  # looking them up changes nothing


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_a_hook_freezes_stands_still(step: int, optimizer: str) -> None:
    trace = Trace(lambda training: weights(training))
    hooks = (AtStep(step, freeze_convolution), trace)
    training = tiny_train(hooks, optimizer=optimizer, momentum=0.9, weight_decay=0.1, clip_norm=1.0, lr=0.01)
    frozen = trace.at("start")[0] if step == 0 else trace.at("step")[step - 1]
    for name, value in weights(training).items():
        if name.startswith("conv"):
            assert torch.equal(value, frozen[name]), name
        elif name.startswith(("linear", "head")):
            assert not torch.equal(value, frozen[name]), name
    assert all(parameter.grad is None for parameter in training.model.get_submodule("conv").parameters())


def test_freezing_takes_the_gradient_out_of_the_clipped_norm() -> None:
    def stale(training: Training) -> None:
        gradient = training.model.get_parameter("conv.weight").grad
        assert gradient is not None
        gradient.fill_(1e6)
        freeze_convolution(training)

    trace = Trace(lambda training: training.model.get_parameter("head.weight").grad)
    tiny_train((AtStep(2, stale), trace), clip_norm=1.0)
    assert min(float(gradient.abs().max()) for gradient in trace.at("step")[2:]) > 1e-4


# The end


def test_divergence_ends_the_training() -> None:
    trace = Trace(lambda training: training.step)
    training = tiny_train((trace,), net=PlainNet, lr=1e6, epochs=200, weight_decay=0.1)
    assert training.status == "diverged"
    assert training.step < training.total_steps
    assert trace.at("end") == [training.step]
    assert trace.at("step")[-1] == training.step
    assert all(math.isfinite(value) for row in training.curve for value in row.values())


def break_it(training: Training) -> None:
    training.model.get_parameter("head.bias").data.fill_(math.nan)


def test_a_diverging_step_is_not_taken() -> None:
    trace = Trace(lambda training: weights(training))
    training = tiny_train((trace, AtStep(8, break_it)))
    assert (training.status, training.step, len(training.curve)) == ("diverged", 8, 1)
    assert torch.equal(training.model.get_parameter("linear.weight"), trace.at("step")[7]["linear.weight"])


def test_divergence_in_the_last_step_shows_in_the_test() -> None:
    training = tiny_train((AtStep(18, break_it),))
    assert (training.status, training.step) == ("diverged", 18)
    assert [row["step"] for row in training.curve] == [6, 12]


def test_a_hook_stops_the_training() -> None:
    trace = Trace(lambda training: training.step)
    training = tiny_train((AtStep(8, lambda training: training.stop("enough")), trace))
    assert (training.status, training.stop_reason, training.step) == ("stopped", "enough", 8)
    assert trace.at("end") == [8]
    assert [row["step"] for row in training.curve] == [6]


# Time and progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still but for what a test adds to it."""
    now = [0.0]
    ticks = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr("collect.training.device.time", ticks)

    def add(seconds: float) -> None:
        now[0] += seconds

    return add


@pytest.mark.parametrize("untimed", [False, True])
def test_time_is_that_of_steps_and_hooks(
    untimed: bool, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Hook):
        def on_step(self, training: Training) -> None:
            with training.untimed() if untimed else contextlib.nullcontext():
                clock(1.0)

        def on_epoch(self, training: Training) -> None:
            clock(10.0)

    def test(training: Training) -> tuple[float, float]:
        clock(100.0)
        return 1.0, 0.5

    monkeypatch.setattr(Training, "test", test)
    training = tiny_train((Slow(),), batch_size=12, epochs=1)
    assert training.train_seconds == training.curve[0]["train_seconds"] == (0.0 if untimed else 2.0)
    assert training.cpu_seconds == training.train_seconds / 2


def test_progress_is_reported_after_each_step() -> None:
    reported: list[tuple[int, int]] = []
    source = tiny_source()
    train(
        tiny_workload(epochs=1),
        seed=0,
        device="cpu",
        source=source,
        progress=lambda step, total: reported.append((step, total)),
    )
    assert reported == [(step, 6) for step in range(1, 7)]

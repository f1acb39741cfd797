import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.training.loop import Training
from predictor.errors import UsageError
from tests.collect.tiny import AtStep, PlainNet, TinyNet, Trace, same, tiny_source, tiny_train, tiny_workload, weights

CPU = torch.device("cpu")


def test_loss_is_of_the_step_just_taken() -> None:
    """With one batch an epoch, and nothing random, the first step's loss is that of the initial weights."""
    trace = Trace(lambda training: training.loss.item())
    training = tiny_train((trace,), net=PlainNet, batch_size=24, epochs=1)
    torch.manual_seed(0)
    _, x_BCHW, labels_B = next(tiny_source().batches("train", 24, shuffle=False))
    assert trace.at("step") == [pytest.approx(F.cross_entropy(PlainNet()(x_BCHW), labels_B).item(), rel=1e-5)]
    assert training.curve[0]["train_loss"] == trace.at("step")[0]


def test_training_loss_is_the_mean_since_the_row_before() -> None:
    trace = Trace(lambda training: training.loss.item())
    training = tiny_train((trace,), epochs=2)
    for row, losses in zip(training.curve, (trace.at("step")[:6], trace.at("step")[6:]), strict=True):
        assert row["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_curve_has_a_row_for_each_epoch_and_one_for_the_end() -> None:
    training = tiny_train(epochs=2.5)
    assert [(row["step"], row["epoch"]) for row in training.curve] == [(6, 1.0), (12, 2.0), (15, 2.5)]
    assert all(set(row) == set(training.curve[0]) for row in training.curve)


def test_scores_are_those_of_the_model_in_evaluation_mode() -> None:
    training = tiny_train()
    training.model.eval()
    _, x_BCHW, labels_B = next(tiny_source().batches("test", 9, shuffle=False))
    with torch.no_grad():
        logits_BC = training.model(x_BCHW)
    assert training.curve[-1]["test_loss"] == pytest.approx(F.cross_entropy(logits_BC, labels_B).item(), rel=1e-5)
    assert training.curve[-1]["test_accuracy"] == (logits_BC.argmax(1) == labels_B).float().mean().item()


def test_testing_leaves_mode_statistics_and_random_numbers_alone() -> None:
    training = Training(tiny_workload(), tiny_source(), seed=0, device=torch.device("cpu"))
    training.model.train()
    before, state = weights(training), torch.get_rng_state()
    training.test()
    assert training.model.training
    assert same(before, weights(training))
    assert torch.equal(state, torch.get_rng_state())


def test_accumulated_batches_equal_one_large_batch() -> None:
    small = tiny_train(net=PlainNet, batch_size=4, accumulate=3, epochs=2)
    large = tiny_train(net=PlainNet, batch_size=12, epochs=2)
    assert small.step == large.step == 4
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value)
    assert small.curve[-1]["train_loss"] == pytest.approx(large.curve[-1]["train_loss"], rel=1e-5)


def test_what_is_around_the_models_call_is_given_the_samples_of_each_batch() -> None:
    inside: list[bool] = []
    seen: list[list[int]] = []

    @contextlib.contextmanager
    def around(ids_B: Tensor) -> Iterator[None]:
        seen.append(ids_B.tolist())
        inside.append(True)
        yield
        inside.pop()

    def begin(training: Training) -> None:
        training.around_forward = around
        training.model.register_forward_hook(lambda *_: calls.append(bool(inside)))

    calls: list[bool] = []
    training = tiny_train((AtStep(0, begin),), net=PlainNet, batch_size=4, accumulate=3, epochs=2)
    batches = [tiny_source().batches("train", 4, seed=0, epoch=epoch, shuffle=True) for epoch in (0, 1)]
    assert seen == [batch[0].tolist() for epoch in batches for batch in epoch]
    # Six batches an epoch, and one of tests.
    assert calls == ([True] * 6 + [False]) * 2
    plain = tiny_train(net=PlainNet, batch_size=4, accumulate=3, epochs=2)
    assert same(weights(training), weights(plain))


def test_what_fills_no_step_is_left_out_of_the_epoch() -> None:
    training = tiny_train(batch_size=5, accumulate=2, epochs=3)
    assert (training.steps_per_epoch, training.step) == (2, 6)


def test_clipping_bounds_what_the_optimizer_sees() -> None:
    def norm(training: Training) -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in training.model.parameters() if p.grad is not None))

    free, clipped = Trace(norm), Trace(norm)
    tiny_train((free,))
    tiny_train((clipped,), clip_norm=0.1)
    assert min(free.at("step")[:3]) > 0.2
    assert max(clipped.at("step")) <= 0.1 + 1e-6


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    """A model that answers 0, 0, 9 for ever: worth more smoothed, and the same when tested."""

    class Fixed(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 0.0, 9.0]))

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return self.bias.expand(len(x_BCHW), -1)

    rows = [tiny_train(net=Fixed, label_smoothing=smoothing, lr=1e-12, epochs=1).curve[0] for smoothing in (0.0, 0.3)]
    expected = F.cross_entropy(torch.tensor([[0.0, 0.0, 9.0]] * 3), torch.arange(3)).item()
    assert [row["test_loss"] for row in rows] == pytest.approx([expected, expected])
    assert rows[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    # Smoothed, each target holds 0.3 / 3 of every class: the mean over classes of -log p is added with weight 0.3.
    assert rows[1]["train_loss"] == pytest.approx(0.7 * expected + 0.3 * expected, rel=1e-4)


def test_a_step_that_wants_more_samples_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"batch_size=8, accumulate=4: a step wants 32 samples and tiny has 24: lower"):
        tiny_train(batch_size=8, accumulate=4)


@pytest.mark.parametrize(
    ("left_out", "kept", "steps"), [(0.0, 24, 6), (0.01, 24, 6), (0.1, 22, 5), (0.5, 12, 3), (0.83, 4, 1)]
)
def test_an_epoch_that_leaves_samples_out_is_that_much_shorter(left_out: float, kept: int, steps: int) -> None:
    begun = [Training(tiny_workload(), tiny_source(), seed=s, device=CPU, left_out=left_out) for s in (0, 0, 1)]
    assert [(training.steps_per_epoch, training.total_steps) for training in begun] == [(steps, 3 * steps)] * 3
    among = [None if training.among is None else training.among.tolist() for training in begun]
    assert among[0] == among[1]
    if kept == 24:
        assert among == [None] * 3
    else:
        assert among[0] != among[2]
        assert among[0] == sorted(set(among[0] or ()))
        assert len(among[0] or ()) == kept


def test_the_more_are_left_out_the_fewer_of_the_same_stay() -> None:
    def among(left_out: float) -> set[int]:
        training = Training(tiny_workload(), tiny_source(), seed=0, device=CPU, left_out=left_out)
        assert training.among is not None
        return set(training.among.tolist())

    assert among(0.8) < among(0.5) < among(0.2)


@pytest.mark.parametrize("left_out", [-0.1, 1.0, math.nan])
def test_a_share_to_leave_out_that_is_none(left_out: float) -> None:
    with pytest.raises(UsageError, match=f"left_out={left_out}: give a share of the training samples"):
        Training(tiny_workload(), tiny_source(), seed=0, device=CPU, left_out=left_out)


def test_too_many_samples_left_out_for_a_step() -> None:
    message = r"wants 4 samples and tiny has 2 beside the share left out, 0\.9: lower them, or leave out less"
    with pytest.raises(UsageError, match=message):
        Training(tiny_workload(), tiny_source(), seed=0, device=CPU, left_out=0.9)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_convolutions_in_channels_last(channels_last: bool) -> None:
    seen: list[Tensor] = []

    class Watching(TinyNet):
        def __init__(self, classes: int) -> None:
            super().__init__(classes)
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))

    training = tiny_train(net=Watching, channels_last=channels_last, epochs=1)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert training.model.get_parameter("second.weight").is_contiguous(memory_format=expected)
    assert all(output.is_contiguous(memory_format=expected) for output in seen)

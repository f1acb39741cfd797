"""Egeria's rule on signals made by hand, and beside real trainings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View
from predictor.policies.egeria import slope
from predictor.policies.measuring.activations import Batch
from predictor.policies.measuring.quantized import QuantizedReference


def made(layers=3, lr=1.0, **options):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers + 1)))
    policy = make_policy("egeria", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    policy.bind(model, optimizer, layers_of(model))
    return policy, optimizer, layers_of(model)


def run(policy, optimizer, layers, rates):
    """The frozen layers after each step, one step for each learning rate, whose losses were recorded already."""
    frozen, history = frozenset(), []
    for step, rate in enumerate(rates, start=1):
        optimizer.param_groups[0]["lr"] = rate
        view = View(layers, frozen, step, 1000)
        policy._follow(view)
        frozen = policy.decide(view)
        history.append(sorted(frozen))
    return history


def test_slope_by_hand():
    assert slope([1.0, 3.0]) == 2.0
    assert slope([5.0, 5.0, 5.0]) == 0.0
    # x - mean: -1.5, -.5, .5, 1.5; sum of products: -1.5 - 2 + 1 + 10.5 = 8; of squares: 5.
    assert slope([1.0, 4.0, 2.0, 7.0]) == pytest.approx(1.6)
    assert slope([7.0, 2.0, 4.0, 1.0]) == pytest.approx(-1.6)


def test_losses_are_smoothed_and_the_first_layer_freezes_once_their_line_is_flat():
    policy, optimizer, layers = made(window=3, patience=2, tolerance=0.25)
    policy._start_over(0)
    calm = []
    # Smoothed: 8, 4, 4, 4, 4, 12. Over windows of 3 the line changes by -4, 0, 0, 8; a quarter of the largest is 2, 3.
    for loss in (8.0, 0.0, 4.0, 4.0, 4.0, 20.0):
        policy._record(loss)
        calm.append(policy._calm)
    assert policy._losses == [4.0, 4.0, 12.0]
    assert calm == [0, 0, 0, 1, 2, 0]
    policy._calm = 1
    assert run(policy, optimizer, layers, [1.0]) == [[]]
    policy._calm = 2
    assert run(policy, optimizer, layers, [1.0, 1.0]) == [[0], [0]]


def test_a_loss_that_is_no_number_is_passed_over():
    policy, *_ = made(window=3)
    policy._start_over(0)
    for loss in (8.0, float("nan"), 0.0, float("inf")):
        policy._record(loss)
    assert policy._losses == [8.0, 4.0]


def test_the_loss_is_that_of_a_sample_whatever_the_batch():
    """Samples that have drifted alike, in a batch of many and in a short last one."""
    losses = []
    for copies in (1, 8):
        torch.manual_seed(0)
        policy, _, layers = made(layers=1)
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]).repeat(copies, 1)
        reference = QuantizedReference(policy._model)
        with torch.no_grad():
            layers[0].modules[0].weight.add_(torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
        policy._measure(layers[0], 0, Batch((x,), {}, ""), reference)
        losses += policy._losses
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_is_flat_is_measured_by_the_largest_loss_of_any_layer():
    policy, *_ = made(window=2, patience=1, tolerance=0.1)
    policy._start_over(0)
    policy._record(100.0)
    policy._start_over(1)
    for loss in (2.0, 8.0):  # smoothed: 2, 5; the line rises by 3 of at most 10
        policy._record(loss)
    assert policy._calm == 1
    policy._record(45.0)  # 25: by 20
    assert policy._calm == 0


def test_all_unfreezing_when_the_rate_is_a_tenth_and_freeze_again_with_half_the_window():
    policy, optimizer, layers = made(window=5, patience=1)
    policy._layer, policy._calm = 1, 1
    assert run(policy, optimizer, layers, [0.5, 0.5, 0.2, 0.05, 0.05]) == [[0, 1], [0, 1], [0, 1], [], []]
    assert (policy.window, policy._layer, policy._losses, policy._calm) == (2, -1, [], 0)
    policy._layer, policy._calm = 0, 1
    assert run(policy, optimizer, layers, [0.05, 0.006, 0.005]) == [[0], [0], []]
    assert policy.window == 2


def test_the_rate_of_the_first_freezing_counts_also_when_it_falls_right_after_it():
    policy, optimizer, layers = made(patience=1)
    policy._layer, policy._calm = 0, 1
    assert run(policy, optimizer, layers, [1.0, 0.1]) == [[0], []]
    policy, optimizer, layers = made(patience=1)
    policy._layer, policy._calm = 0, 1
    assert run(policy, optimizer, layers, [0.0, 0.0]) == [[0], [0]]  # a rate of 0 does not fall any more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bootstrap": 1.0}, "bootstrap=1.0"),
        ({"window": 1}, "window=1: a line needs"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"patience": 0}, "patience=0"),
        ({"refresh": 0}, "refresh=0"),
        ({"checks": 0}, "checks=0"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_policy("egeria", **options)


def train(model, policy, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = FreezeController(model, optimizer, policy, total_steps=steps)
    hooked = []
    for step in range(steps):
        torch.manual_seed(step)
        hooked.append(len(model._forward_pre_hooks))
        F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(3, (8,))).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return controller, hooked


def test_as_long_as_it_freezes_nothing_the_training_is_what_it_was(make_toy):
    plain, watched = make_toy(), make_toy()
    train(plain, make_policy("none"), 12)
    policy = make_policy("egeria", tolerance=1e-12, checks=12)
    controller, _ = train(watched, policy, 12)
    assert policy._done == 11  # from step 2 on: a tenth of 12 steps is over then
    assert policy._largest > 0
    assert not controller.history
    states = zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    assert all(torch.equal(before, after) for before, after in states)


def test_a_hook_is_there_in_the_steps_before_a_check_alone_and_after_close_nothing(make_toy):
    model = make_toy()
    policy = make_policy("egeria", checks=5, bootstrap=0.3)
    controller, hooked = train(model, policy, 20)
    # Checks are due at steps 4, 8, 12, 16, 20; the first of them is before 6. The first step has the first pass's hook.
    assert [step for step, count in enumerate(hooked, start=1) if step > 1 and count > hooked[1]] == [8, 12, 16, 20]
    assert policy._done == 4
    assert len(model._forward_pre_hooks) == hooked[1]
    policy._taker.wait()
    controller.close()
    assert not model._forward_pre_hooks
    assert policy._reference is None


def test_a_layer_without_rows_to_measure_freezes_with_the_one_behind():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lone, self.last, self.head = nn.Linear(64, 63), nn.Linear(64, 63), nn.Linear(63, 3)

        def forward(self, x):
            lone = self.lone(x.flatten(1).mean(0))
            return self.head(self.last(x.flatten(1)) + lone)

    torch.manual_seed(0)
    controller, _ = train(Odd(), make_policy("egeria", window=2, patience=1, tolerance=10.0), 12)
    assert [event.froze for event in controller.history] == [(0, 1)]

"""What SmartFRZ takes for the state of a training, in loops of every kind."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from predictor import FreezeController, layers_of, make_policy
from predictor.errors import UsageError
from predictor.model.features import SIGNALS, log_lr
from predictor.policies.base import View

LR = SIGNALS.index("log_lr")
STEPS = 12
RATES = [1 - step / STEPS for step in range(STEPS)]
X = torch.linspace(-1, 1, 64).reshape(16, 4)


class Training:
    """A small network under a schedule. Every step has its snapshot."""

    def __init__(self, policy, wrapped=lambda optimizer: optimizer, as_lr=float, rate=lambda step: 1 - step / STEPS):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=as_lr(1.0))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        optimizer = wrapped(self.optimizer)
        self.controller = FreezeController(self.model, optimizer, policy, total_steps=STEPS, say=None)

    def step(self, schedule_first=False, spoil=lambda model: None):
        self.model(X).square().mean().backward()
        spoil(self.model)
        if all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters()):  # as a GradScaler
            self.optimizer.step()
        actions = [self.controller.step, self.schedule.step]
        for action in reversed(actions) if schedule_first else actions:
            action()
        self.optimizer.zero_grad()

    def rates(self):
        """The rates of the newest snapshots, over the highest."""
        return [math.exp(signals[0, LR]) for signals in self.controller.policy._signals]


@pytest.fixture
def make(make_predictor_file):
    """The policy; it freezes nothing."""
    path = make_predictor_file(probability=0.1, window=STEPS)
    return lambda: make_policy("smartfrz", predictor=path)


@pytest.mark.parametrize("as_lr", [float, torch.tensor])
@pytest.mark.parametrize("schedule_first", [False, True])
def test_the_rate_is_that_of_the_step_just_taken_wherever_the_schedule_goes_on(make, schedule_first, as_lr):
    training = Training(make(), as_lr=as_lr)
    for _ in range(4):
        training.step(schedule_first)
    assert training.rates() == pytest.approx([1, *RATES[:4]])


def test_a_plain_loop_sees_the_optimizers_rate_to_the_bit(make):
    training = Training(make())
    expected = [0.0]
    for _ in range(4):
        expected.append(log_lr(training.optimizer.param_groups[0]["lr"], 1.0))
        training.step()
    signals = [signals[0, LR] for signals in training.controller.policy._signals]
    assert signals == [torch.tensor(rate, dtype=torch.float32) for rate in expected]


def test_the_rate_is_seen_through_accelerates_optimizer(make):
    accelerate = pytest.importorskip("accelerate")
    training = Training(make(), wrapped=accelerate.Accelerator(cpu=True).prepare_optimizer)
    training.step(schedule_first=True)
    training.step(schedule_first=True)
    assert training.rates() == pytest.approx([1, *RATES[:2]])


def test_a_resumed_training_sees_the_same_rates(make):
    training = Training(make())
    for _ in range(3):
        training.step(schedule_first=True)
    resumed = Training(make())
    for part in ("model", "optimizer", "schedule", "controller"):
        getattr(resumed, part).load_state_dict(copy.deepcopy(getattr(training, part).state_dict()))
    for each in (training, resumed):
        each.step(schedule_first=True)
    assert resumed.rates() == training.rates() == pytest.approx([1, *RATES[:4]])


def test_a_policy_that_watches_steps_can_be_copied_pickled_bound_again_and_closed(make):
    policy = make()
    training = Training(policy)
    training.optimizer.register_step_post_hook(lambda *_: None)  # which no pickle takes
    hooks = len(training.optimizer._optimizer_step_post_hooks)
    copy.deepcopy(policy).close()
    assert pickle.loads(pickle.dumps(policy)).state_dict().keys() == policy.state_dict().keys()
    policy.bind(training.model, training.optimizer, training.controller.layers)
    assert len(training.optimizer._optimizer_step_post_hooks) == hooks
    training.controller.close()
    assert len(training.optimizer._optimizer_step_post_hooks) == hooks - 1
    training.step()  # without the hook the rate is that of now


def test_without_a_step_the_rate_is_that_of_now(make):
    policy = make()
    training = Training(policy)
    training.schedule.optimizer.param_groups[0]["lr"] = 0.5
    policy._watch = lambda *_: None
    policy.decide(View(layers_of(training.model), frozenset(), 1, STEPS))
    assert training.rates() == pytest.approx([1, 0.5])


def overflow(model):
    model[1].weight.grad.fill_(math.inf)


def cancel(model):
    model[0].bias.grad.fill_(math.nan)


def leave_out(model):
    model.zero_grad()


@pytest.mark.parametrize("spoil", [overflow, cancel, leave_out])
def test_a_step_without_good_gradients_leaves_gradient_and_motion_as_they_were(make, spoil):
    training = Training(make())
    policy = training.controller.policy
    training.step()
    training.step()
    before = policy._gradient_L.clone(), policy._move_L.clone()
    training.step(spoil=spoil)
    assert torch.equal(policy._gradient_L, before[0])
    assert torch.equal(policy._move_L, before[1])
    training.step()
    assert not (policy._gradient_L == before[0]).any()
    assert not (policy._move_L == before[1]).any()
    training.step(spoil=spoil)  # not two in a row


def test_a_layer_without_a_gradient_among_others_keeps_its_own_alone(make):
    training = Training(make())
    policy = training.controller.policy
    training.step()
    before = policy._gradient_L.clone()
    training.step(spoil=lambda model: model[1].zero_grad())
    assert (policy._gradient_L == before).tolist() == [False, True, False]


def test_without_gradients_twice_in_a_row_it_says_that_they_were_cleared(make):
    training = Training(make())
    training.step(spoil=leave_out)
    assert training.controller.frozen == frozenset()
    with pytest.raises(UsageError, match="no layer has a gradient at step 2, nor had one when smartfrz looked before"):
        training.step(spoil=leave_out)


def test_where_the_user_lets_all_but_the_head_stand_still_nothing_is_missed(make):
    training = Training(make())
    training.model[:3].requires_grad_(False)
    for _ in range(STEPS):
        training.step()


def test_what_a_frozen_layer_would_still_gain_falls_with_that_of_the_others(make_predictor_file):
    path = make_predictor_file(probability=0.1, window=STEPS, risks=((0.5, 0.5),))
    training = Training(make_policy("smartfrz", predictor=path))
    policy = training.controller.policy
    for _ in range(3):
        training.step()
    before = policy._gradient_L.clone(), policy._move_L.clone()
    training.controller._change(frozenset({0}))
    training.step()
    for (first, *others), now in zip(before, (policy._gradient_L, policy._move_L), strict=True):
        change = torch.linalg.vector_norm(now[1:]) / torch.linalg.vector_norm(torch.stack(others))
        assert 0 < change < 1  # this training converges
        assert float(now[0]) == pytest.approx(float(first * change))


def test_without_outcomes_a_frozen_layer_keeps_what_its_training_gained_last(make):
    training = Training(make())
    policy = training.controller.policy
    for _ in range(3):
        training.step()
    before = policy._gradient_L[0].clone(), policy._move_L[0].clone()
    training.controller._change(frozenset({0}))
    training.step()
    assert (policy._gradient_L[0], policy._move_L[0]) == before


@pytest.mark.parametrize(
    ("rate", "frozen_at"),
    [
        (lambda step: 1.0, 5),
        (lambda step: 1 - step / STEPS, 5),
        (lambda step: 0.5 ** (step // 3), 5),  # steps so small are a steady fall
        (lambda step: 0.7**step, 5),
        (lambda step: 0.1 if step >= 3 else 1.0, 9),  # the first snapshot behind the drop is the fourth
        (lambda step: 0.1 ** (step // 4), None),  # it drops before the window is full, each time
    ],
)
def test_where_the_learning_rate_drops_the_window_begins_anew(make_predictor_file, rate, frozen_at):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=6))
    training = Training(policy, rate=rate)
    frozen = [bool(training.controller.frozen) for _ in range(STEPS) if training.step() is None]
    assert (frozen.index(True) + 1 if True in frozen else None) == frozen_at


def test_a_layer_that_was_frozen_before_it_ever_trained_has_nothing_to_gain(make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.1, window=STEPS), front=0.3)
    training = Training(policy)
    for _ in range(4):
        training.step()
    assert training.controller.frozen == {0}
    assert policy._gradient_L[0] == policy._move_L[0] == 0
    assert (policy._gradient_L[1:] > 0).all()

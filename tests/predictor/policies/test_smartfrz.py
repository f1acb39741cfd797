"""When SmartFRZ freezes, and what it reads from training loops of every kind."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from predictor import FreezeController, layers_of, make_policy
from predictor.errors import FileFault, UsageError
from predictor.model.config import FEATURES
from predictor.model.features import log_lr
from predictor.model.file import load_predictor
from predictor.policies.base import View
from predictor.policies.smartfrz import SHIPPED

LR = FEATURES.index("log_lr")
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

    def step(self, schedule_first=False, spoil=lambda model: None, cleared=False):
        self.model(X).square().mean().backward()
        spoil(self.model)
        if all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters()):  # as a GradScaler
            self.optimizer.step()
        if cleared:
            self.model.zero_grad()
        actions = [self.controller.step, self.schedule.step]
        for action in reversed(actions) if schedule_first else actions:
            action()
        self.optimizer.zero_grad()

    @property
    def history(self):
        return self.controller.policy._history

    def rates(self):
        """The rates of the newest snapshots, over the highest."""
        return [math.exp(features[0, LR]) for features in self.history._features]


@pytest.fixture
def make(make_predictor_file):
    """The policy. It freezes nothing."""
    path = make_predictor_file(probability=0.1, window=STEPS)
    return lambda: make_policy("smartfrz", predictor=path)


@pytest.mark.parametrize("as_lr", [float, torch.tensor])
@pytest.mark.parametrize("schedule_first", [False, True])
def test_the_rate_is_that_of_the_step_just_taken_wherever_the_schedule_goes_on(make, schedule_first, as_lr):
    training = Training(make(), as_lr=as_lr)
    for _ in range(4):
        training.step(schedule_first)
    assert training.rates() == pytest.approx([1, *RATES[:4]])


def test_a_plain_loop_gives_the_optimizers_rate_to_the_bit(make):
    training = Training(make())
    expected = [0.0]
    for _ in range(4):
        expected.append(log_lr(training.optimizer.param_groups[0]["lr"], 1.0))
        training.step()
    found = [features[0, LR] for features in training.history._features]
    assert found == [torch.tensor(rate, dtype=torch.float32) for rate in expected]


def test_the_rate_is_read_through_accelerates_optimizer(make):
    accelerate = pytest.importorskip("accelerate")
    training = Training(make(), wrapped=accelerate.Accelerator(cpu=True).prepare_optimizer)
    training.step(schedule_first=True)
    training.step(schedule_first=True)
    assert training.rates() == pytest.approx([1, *RATES[:2]])


def test_a_resumed_training_has_the_same_history(make):
    training = Training(make())
    for _ in range(3):
        training.step(schedule_first=True)
    resumed = Training(make())
    for part in ("model", "optimizer", "schedule", "controller"):
        getattr(resumed, part).load_state_dict(copy.deepcopy(getattr(training, part).state_dict()))
    for each in (training, resumed):
        each.step(schedule_first=True)
    assert resumed.rates() == training.rates() == pytest.approx([1, *RATES[:4]])
    assert torch.equal(resumed.history.features_LF, training.history.features_LF)


def test_a_state_may_be_loaded_before_the_first_decision(make):
    training = Training(make())
    for _ in range(3):
        training.step()
    policy, layers = make(), training.controller.layers
    policy.bind(training.model, training.optimizer, layers)
    policy.load_state_dict(training.controller.policy.state_dict())
    assert policy.state_dict().keys() == training.controller.policy.state_dict().keys()
    training.step()
    policy.decide(View(layers, frozenset(), 4, STEPS))
    assert policy._history.length == 5


def test_a_policy_with_a_hook_can_be_copied_pickled_bound_again_and_closed(make):
    policy = make()
    training = Training(policy)
    training.optimizer.register_step_post_hook(lambda *_: None)  # which cannot be pickled
    hooks = len(training.optimizer._optimizer_step_post_hooks)
    copy.deepcopy(policy).close()
    assert pickle.loads(pickle.dumps(policy)).state_dict().keys() == policy.state_dict().keys()
    policy.bind(training.model, training.optimizer, training.controller.layers)
    assert len(training.optimizer._optimizer_step_post_hooks) == hooks
    assert policy._history is None  # another training begins
    training.controller.close()
    assert len(training.optimizer._optimizer_step_post_hooks) == hooks - 1
    training.step()  # without the hook the rate is that of now


def overflow(model):
    model[1].weight.grad.fill_(math.inf)


def invalid(model):
    model[0].bias.grad.fill_(math.nan)


def leave_out(model):
    model.zero_grad()


@pytest.mark.parametrize("spoil", [overflow, invalid, leave_out])
def test_a_step_that_is_skipped_leaves_the_history_as_it_was(make, spoil):
    training = Training(make())
    training.step()
    before = training.history.features_LF
    for _ in range(3):  # batches that are left out, however many
        training.step(spoil=spoil)
    assert training.history.features_LF is before
    training.step()
    assert training.history.length == 3


def test_with_gradients_cleared_too_early_twice_in_a_row_it_raises(make):
    training = Training(make())
    training.step(cleared=True)
    training.step()
    training.step(cleared=True)
    assert training.controller.frozen == frozenset()
    with pytest.raises(UsageError, match=r"step 4.*before optimizer\.zero_grad"):
        training.step(cleared=True)


def test_if_the_user_holds_all_layers_but_the_head_still_nothing_is_missed(make):
    training = Training(make())
    training.model[:3].requires_grad_(False)
    for _ in range(STEPS):
        training.step()
    assert training.history.length == 0


@pytest.mark.parametrize(
    ("rate", "frozen_at"),
    [
        (lambda step: 1.0, 5),
        (lambda step: 1 - step / STEPS, 5),
        (lambda step: 0.5 ** (step // 3), 5),  # small steps are a steady fall
        (lambda step: 0.7**step, 5),
        (lambda step: 0.1 if step >= 3 else 1.0, 9),  # the first snapshot behind the drop is the fourth
        (lambda step: 0.1 ** (step // 4), None),  # it drops before the window is full, each time
    ],
)
def test_after_a_drop_of_the_rate_it_waits_for_a_whole_window(make_predictor_file, rate, frozen_at):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=6))
    training = Training(policy, rate=rate)
    frozen = [bool(training.controller.frozen) for _ in range(STEPS) if training.step() is None]
    assert (frozen.index(True) + 1 if True in frozen else None) == frozen_at


def test_a_rate_far_below_the_one_that_is_named_will_rise_and_shows_nothing_till_then(make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=6))
    training = Training(policy, rate=lambda step: 0.001 if step < 6 else 1.0)
    frozen = [bool(training.controller.frozen) for _ in range(STEPS) if training.step() is None]
    assert frozen.index(True) + 1 == 11  # the newest snapshot at the low rate is the first of a window


def test_a_layer_that_was_frozen_before_it_ever_trained_has_nothing_to_gain(make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.1, window=STEPS), front=0.3)
    training = Training(policy)
    for _ in range(4):
        training.step()
    assert training.controller.frozen == {0}
    assert training.history._gradient_L[0] == training.history._move_L[0] == 0
    assert (training.history._gradient_L[1:] > 0).all()


def test_batches_that_are_left_out_at_random_are_no_fault_of_the_loop(make):
    training = Training(make())
    for step in range(STEPS):
        if step in (2, 3, 6, 8, 9):  # a guard against bad losses; at the snapshots of 4 and 10 nothing has a gradient
            training.optimizer.zero_grad()
            training.controller.step()
        else:
            training.step()


def by_layer(training, *shares):
    """Give each layer a group of its own, at a share of the rate."""
    layers = [*training.controller.layers, None]
    held = {id(p) for layer in layers[:-1] for p in layer.own}
    rest = [p for p in training.model.parameters() if id(p) not in held]
    parameters = [list(layer.own) if layer else rest for layer in layers]
    groups = zip(parameters, shares, strict=True)
    return torch.optim.SGD([{"params": own, "lr": share} for own, share in groups])


def decide_under(make_file, rates_of_step, steps=10):
    """A policy whose layers have groups of their own, after steps under these rates."""
    policy = make_policy("smartfrz", predictor=make_file(probability=0.9, window=4))
    training = Training(make_policy("none"))
    optimizer = by_layer(training, 1.0, 1.0, 1.0, 1.0)
    controller = FreezeController(training.model, optimizer, policy, total_steps=STEPS, say=None)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates_of_step(step), strict=True):
            group["lr"] = rate
        training.model(X).square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return controller


def test_each_layer_has_the_rate_of_its_own_group(make_predictor_file):
    def rates(step):  # the first is held still until step 4, and the third rises and falls
        return [0.01 if step >= 4 else 0.0, 0.01, 0.01 if step % 4 < 2 else 0.001, 0.1]

    controller = decide_under(make_predictor_file, rates)
    assert controller.frozen == {0, 1}
    assert controller.history[0].step == 3  # the second, behind one that is at rest
    assert controller.history[0].frozen == (1,)
    assert controller.history[1].step == 4 + 4


class OwnRate(torch.optim.Optimizer):
    """Finds its rate itself, as Adafactor, and leaves something else in its groups."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr} if lr != "missing" else {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)


@pytest.mark.parametrize("lr", [None, math.nan, "missing"])
def test_an_optimizer_without_a_rate_in_its_groups_is_taken_for_constant(make_predictor_file, lr):
    policy = make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=4))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = OwnRate(model.parameters(), lr)
    controller = FreezeController(model, optimizer, policy, total_steps=STEPS, say=None)
    for step in range(1, 5):
        model(X).square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        assert bool(controller.frozen) == (step >= 3)


def decided(policy, view_options, steps=6):
    """What is frozen after each step of a training in which the user may hold layers."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    layers = layers_of(model)
    policy.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    frozen, history = policy.decide(View(layers, frozenset(), 0, 12)), []
    for step in range(1, steps + 1):
        resting = frozenset(view_options(step)) - frozen
        for index, layer in enumerate(layers):
            if index not in resting | frozen:
                grow(layer.own)
            for parameter in layer.own:
                parameter.grad = None if index in resting | frozen else torch.ones_like(parameter)
        frozen = policy.decide(View(layers, frozen, step, 12, resting=resting))
        history.append(sorted(frozen))
    return history


def test_a_stem_that_the_user_holds_still_is_passed_over_and_joins_the_prefix(make_predictor_file):
    path = make_predictor_file(probability=0.9, window=3)
    assert decided(make_policy("smartfrz", predictor=path), lambda step: {0}) == [[], *[[0, 1, 2]] * 5]
    assert decided(make_policy("smartfrz", predictor=path, prefix=False), lambda step: {0}) == [[], *[[1, 2]] * 5]


def test_a_layer_that_the_user_opens_is_judged_after_a_window_and_holds_up_those_behind_it(make_predictor_file):
    path = make_predictor_file(probability=0.9, window=4)
    found = decided(make_policy("smartfrz", predictor=path), lambda step: {0} if step < 3 else set(), steps=7)
    assert found == [[], [], [], [], [], [0, 1, 2], [0, 1, 2]]


def test_what_is_held_still_behind_the_prefix_stays_the_users(make_predictor_file):
    path = make_predictor_file(probability=0.9, window=3)
    assert decided(make_policy("smartfrz", predictor=path), lambda step: {2})[-1] == [0, 1]


def test_a_layer_that_is_switched_on_and_off_all_the_time_is_not_judged(make_predictor_file):
    path = make_predictor_file(probability=0.9, window=3)
    found = decided(make_policy("smartfrz", predictor=path), lambda step: {0} if step % 2 else set(), steps=9)
    assert found[-1] == []


def test_the_users_default_dtype_and_device_change_no_decision(make_predictor_file):
    def train():
        training = Training(make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=4)))
        for _ in range(3):
            training.step()
        return training

    plain = train().history.features_LF
    training = train()
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(2):
            training.model(X).square().mean().backward()
            training.optimizer.step()
            with torch.device("meta"):
                training.controller.step()
            training.optimizer.zero_grad()
    finally:
        torch.set_default_dtype(torch.float32)
    assert training.history.features_LF.dtype == plain.dtype
    assert training.controller.frozen == {0, 1, 2}


def chain(layers):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers + 1)))


@torch.no_grad()
def grow(parameters):
    for parameter in parameters:
        parameter.add_(0.01)


def run(path, steps, total_steps=12, **options):
    """The policy, and what was frozen after each step of a training in which all weights grow."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = layers_of(model)
    policy = make_policy("smartfrz", predictor=path, **options)
    policy.bind(model, optimizer, layers)
    frozen = policy.decide(View(layers, frozenset(), 0, total_steps))
    history = [sorted(frozen)]
    for step in range(1, steps + 1):
        grow(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if policy.due(step, total_steps):
            frozen = policy.decide(View(layers, frozen, step, total_steps))
        history.append(sorted(frozen))
    return policy, history


def test_it_waits_for_a_whole_window_and_then_freezes_what_is_ready(make_predictor_file):
    # 12 snapshots over 24 steps: one every second step. The third, with that of step 0, is taken at step 4.
    _, history = run(make_predictor_file(probability=0.9, threshold=0.5), steps=5, total_steps=24)
    assert history == [[], [], [], [], [0, 1, 2], [0, 1, 2]]


def test_it_freezes_nothing_below_its_threshold(make_predictor_file):
    path = make_predictor_file(probability=0.9, threshold=0.95)
    assert run(path, steps=12)[1][-1] == []
    assert run(path, steps=12, threshold=0.8)[1][-1] == [0, 1, 2]


@pytest.mark.parametrize(("prefix", "expected"), [(True, {0}), (False, {0, 2})])
def test_the_frozen_set_is_a_prefix_by_default(make_predictor_file, prefix, expected):
    policy = make_policy("smartfrz", predictor=make_predictor_file(threshold=0.5), prefix=prefix)
    view = View(layers_of(chain(3)), frozenset(), 1, 12)
    assert policy._choose(view, dict(zip(view.active, [0.9, 0.1, 0.9], strict=True))) == expected
    view = View(layers_of(chain(4)), frozenset({0, 1}), 1, 12)
    assert policy._choose(view, dict(zip(view.active, [0.9, 0.1], strict=True))) == {2}


def test_the_predictor_gets_the_windows_of_the_active_layers(make_predictor_file):
    policy, _ = run(make_predictor_file(probability=0.1), steps=5)
    weights_BWK, features_BWF = policy._history.windows([1, 2])
    assert weights_BWK.shape == (2, 3, 8)
    # Every weight grew by 0.01 a step, and each of the 12 steps has its snapshot.
    assert torch.allclose(weights_BWK.diff(dim=1), torch.full((2, 2, 8), 0.01), atol=1e-6)
    assert torch.allclose(features_BWF[..., 0], torch.tensor([3 / 12, 4 / 12, 5 / 12]).expand(2, 3))
    assert features_BWF[:, 0, 1].tolist() == [0.5, 1.0]
    seen = []
    policy._model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[0]))
    grow(policy._optimizers[0].param_groups[0]["params"])
    policy.decide(View(layers_of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))), frozenset({0}), 6, 12))
    assert [tokens.shape for tokens in seen] == [(2, 2, policy._model.config.width)]


def test_a_risk_stands_for_a_threshold(make_predictor_file):
    known = load_predictor(SHIPPED).risks
    assert make_policy("smartfrz").threshold == dict(known)[0.5]
    assert make_policy("smartfrz", risk=2.0).threshold == dict(known)[2.0] < dict(known)[0.5]
    with pytest.raises(UsageError, match=r"threshold=0.5, risk=1.0: give one of them"):
        make_policy("smartfrz", risk=1.0, threshold=0.5)
    with pytest.raises(UsageError, match=r"risk=50: .* from 0.1 to 2"):
        make_policy("smartfrz", risk=50)
    with pytest.raises(UsageError, match="does not know what freezing costs"):
        make_policy("smartfrz", predictor=make_predictor_file(), risk=0.5)


def test_a_layer_needs_votes_in_a_row(make_predictor_file):
    policy = make_policy("smartfrz", predictor=make_predictor_file(threshold=0.5), votes=2)
    view = View(layers_of(chain(3)), frozenset(), 1, 12)
    assert policy._choose(view, dict(zip(view.active, [0.9, 0.9, 0.9], strict=True))) == set()
    resumed = make_policy("smartfrz", predictor=make_predictor_file(threshold=0.5), votes=2)
    resumed.load_state_dict(policy.state_dict())
    assert policy._choose(view, dict(zip(view.active, [0.9, 0.1, 0.9], strict=True))) == {0}
    assert policy._choose(view, dict(zip(view.active, [0.9, 0.9, 0.9], strict=True))) == {
        0
    }  # the second layer begins again
    assert resumed._choose(view, dict(zip(view.active, [0.9, 0.9, 0.1], strict=True))) == {0, 1}


def test_a_share_of_the_layers_freezes_before_the_first_step(make_predictor_file):
    path = make_predictor_file(probability=0.1, threshold=0.5)
    assert run(path, steps=1)[1] == [[], []]
    _, history = run(path, steps=5, total_steps=12, front=0.4)  # of three layers
    assert history == [[0]] * 6
    ready = make_predictor_file(probability=0.9, threshold=0.5)
    assert run(ready, steps=5, total_steps=24, front=0.7)[1] == [[0, 1]] * 4 + [[0, 1, 2]] * 2


@pytest.mark.parametrize("options", [{"threshold": 1.2}, {"votes": 0}, {"front": 1.5}])
def test_an_option_out_of_range_is_refused(make_predictor_file, options):
    ((name, value),) = options.items()
    with pytest.raises(UsageError, match=f"{name}={value}: give"):
        make_policy("smartfrz", predictor=make_predictor_file(), **options)


def test_a_file_that_is_no_predictor_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not a predictor")
    with pytest.raises(FileFault, match=r"x\.safetensors"):
        make_policy("smartfrz", predictor=tmp_path / "x.safetensors")

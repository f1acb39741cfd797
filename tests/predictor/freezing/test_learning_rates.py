"""Learning rates by layer: the same as parameter groups of their own, without any."""

import math

import pytest
import torch
from torch.nn import functional as F

from predictor import FreezeController, FreezePolicy, make_policy
from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies.freezeout import FreezeOutPolicy

STEPS = 12


class Factors(FreezePolicy):
    """The same factors at every step, and nothing frozen but what the test says."""

    def __init__(self, factors, frozen=()):
        self.factors, self.frozen, self.asked = factors, frozenset(frozen), []

    def rates(self, view):
        self.asked.append(view.step)
        return self.factors

    def decide(self, view):
        return self.frozen


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


def backward(model, step):
    torch.manual_seed(step)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(3, (8,))
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y).backward()


def train(model, optimizer, controller=None, rates=lambda step: None, schedule=None):
    for step in range(STEPS):
        rates(step)
        backward(model, step)
        optimizer.step()
        if controller:
            controller.step()
        if schedule:
            schedule.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def controlled(model, policy, make=OPTIMIZERS["sgd"]):
    optimizer = make(model.parameters())
    return optimizer, FreezeController(model, optimizer, policy, total_steps=STEPS, say=None)


def in_groups(model, make, layers, factors):
    """An optimizer with a group for each layer, and one for the rest."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    optimizer = make(
        [
            *({"params": list(layer.parameters())} for layer in layers),
            {"params": [parameter for parameter in model.parameters() if id(parameter) not in inside]},
        ]
    )
    for index, factor in factors.items():
        optimizer.param_groups[index]["lr"] *= factor
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("factor", [0.3, 2.5])
def test_a_factor_equals_a_parameter_group_with_its_own_rate(name, factor, make_toy):
    # In float64: Adam scales up whatever rounding leaves in a small gradient, and that differs between processors.
    model, twin, other = (make_toy().double() for _ in range(3))
    optimizer, controller = controlled(model, Factors({1: factor}), OPTIMIZERS[name])
    moved = train(model, optimizer, controller)
    expected = train(twin, in_groups(twin, OPTIMIZERS[name], layers_of(twin), {1: factor}))
    plain = train(other, OPTIMIZERS[name](other.parameters()))
    # Not the convolutions' biases: BatchNorm behind them leaves them gradients of rounding alone, which Adam scales up.
    for number in set(range(len(moved))) - {1, 5}:
        torch.testing.assert_close(moved[number], expected[number], rtol=1e-7, atol=1e-10)
    assert not torch.allclose(moved[4], plain[4], atol=1e-3)
    assert len(optimizer.param_groups) == 1


def test_a_factor_of_zero_holds_a_layer_and_one_changes_nothing_at_all(make_toy):
    model = make_toy()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    held = train(model, *controlled(model, Factors({0: 0.0, 2: 1.0})))
    assert torch.equal(held[0], start[0])
    assert not torch.equal(held[-1], start[-1])
    twin, other = make_toy(), make_toy()
    ones = train(twin, *controlled(twin, Factors({0: 1.0, 1: 1.0})))
    plain = train(other, OPTIMIZERS["sgd"](other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ones, plain, strict=True))


def test_without_rates_there_is_no_hook_and_closing_takes_hooks_away(make_toy):
    model = make_toy()
    optimizer, _ = controlled(model, make_policy("none"))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    policy = Factors({0: 0.5})
    _, controller = controlled(model, policy, lambda parameters: optimizer)
    controller.close()
    backward(model, 0)
    optimizer.step()
    assert policy.asked == []
    assert not optimizer._optimizer_step_pre_hooks


def test_a_frozen_layer_is_left_alone_and_the_policy_is_asked_before_each_step(make_toy):
    model, policy = make_toy(), Factors({0: 2.0}, frozen={0})
    before = model.body[0].weight.detach().clone()
    train(model, *controlled(model, policy))
    assert torch.equal(before, model.body[0].weight)
    assert policy.asked == list(range(STEPS))


def test_gradients_made_by_a_closure_during_the_step_are_scaled_too(make_toy):
    model = make_toy()
    optimizer, _ = controlled(model, Factors({0: 0.0}))
    before = model.body[0].weight.detach().clone()

    def closure():
        loss = F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(before, model.body[0].weight)
    assert not torch.equal(model.body[3].weight, make_toy().body[3].weight)


def test_each_of_several_optimizers_scales_its_own_weights(make_toy):
    model, twin = make_toy(), make_toy()
    pair = [torch.optim.SGD(model.body[:4].parameters(), 0.1), torch.optim.SGD(model.body[4:].parameters(), 0.1)]
    rest = torch.optim.SGD(model.head.parameters(), 0.1)
    FreezeController(model, [*pair, rest], Factors({0: 0.5, 2: 0.5}), total_steps=1, say=None)
    for net in (model, twin):
        backward(net, 0)
    for optimizer in (*pair, rest):
        optimizer.step()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for index, factor in ((0, 0.5), (3, 1.0), (8, 0.5)):
        start, full = make_toy().body[index].weight, twin.body[index].weight
        torch.testing.assert_close(model.body[index].weight, start + factor * (full - start))


@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_a_step_that_a_grad_scaler_skips_breaks_nothing(name, make_toy):
    model = make_toy()
    optimizer, controller = controlled(model, Factors({0: 0.5}), OPTIMIZERS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(number, broken):
        torch.manual_seed(number)
        loss = F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(3, (8,)))
        scaler.scale(loss * (float("inf") if broken else 1.0)).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        optimizer.zero_grad()
        return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    assert [step(n, broken) for n, broken in enumerate([False, True, False, True, True, False])] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("factors", "message"),
    [({3: 0.5}, "layer 3 of 3"), ({0: -0.5}, "a learning rate of -0.5 times"), ({0: float("nan")}, "of nan times")],
)
def test_what_cannot_work_is_refused(factors, message, make_toy):
    model = make_toy()
    with pytest.raises(UsageError, match=message):
        train(model, *controlled(model, Factors(factors)))


class RatesAlone(FreezeOutPolicy):
    """Freezes nothing, so that running statistics and dropout go on in both networks."""

    def decide(self, view):
        return frozenset()


def test_freezeout_trains_each_layer_at_its_own_cosine_under_any_schedule(make_toy):
    # u = .5, .667, .833 for three of four layers, the head among them; squared .25, .444, .694; warm-up, then linear.
    def shape(step):
        return (step + 1) / 3 if step < 3 else 1 - (step - 3) / STEPS

    model, twin = make_toy().double(), make_toy().double()
    plain = lambda groups: torch.optim.SGD(groups, lr=0.05)  # noqa: E731
    optimizer = plain(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    policy = RatesAlone(schedule="squared", t0=0.5, scaled=True)
    controller = FreezeController(model, optimizer, policy, total_steps=STEPS, say=None)
    reference = in_groups(twin, plain, layers_of(twin), {})

    def set_rates(step):
        for index, group in enumerate(reference.param_groups):
            end = (0.5 + 0.5 * index / 3) ** 2
            t = min(step / STEPS, end)
            own = 0.5 * 0.05 / end * (1 + math.cos(math.pi * t / end))
            group["lr"] = own if index < 3 else 0.05 * shape(step)

    moved = train(model, optimizer, controller, schedule=schedule)
    expected = train(twin, reference, rates=set_rates)
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-10)


def test_accelerates_optimizer_is_followed_to_the_one_inside(make_toy):
    accelerate = pytest.importorskip("accelerate")
    model = make_toy()
    outer = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), 0.1))
    FreezeController(model, outer, Factors({0: 0.0}), total_steps=1, say=None)
    before = [model.body[index].weight.detach().clone() for index in (0, 3)]
    backward(model, 0)
    outer.step()
    assert torch.equal(before[0], model.body[0].weight)
    assert not torch.equal(before[1], model.body[3].weight)


class SharpnessAware(torch.optim.Optimizer):
    """SAM as it is mostly written: it climbs, and then its base optimizer steps from where it was."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, options)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def climb(self):
        self.before = [(p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in self.before:
            parameter.add_(parameter.grad, alpha=0.01)
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        for parameter, before in self.before:
            parameter.copy_(before)
        self.base_optimizer.step()


def train_sharpness_aware(model, outer, controller, steps=4):
    for step in range(steps):
        backward(model, step)
        outer.climb()
        backward(model, step)
        outer.descend()
        controller.step()
        outer.zero_grad()


def test_an_optimizer_that_steps_another_inside_it_is_warned_of(make_toy):
    model = make_toy()
    outer = SharpnessAware(model.parameters(), lr=0.1)
    controller = FreezeController(model, outer, Factors({0: 0.0}), total_steps=STEPS, say=None)
    with pytest.warns(UserWarning, match=r"learning rates are not applied.*optimizer\.base_optimizer") as said:
        train_sharpness_aware(model, outer, controller)
    assert len(said) == 1


def test_the_optimizer_inside_another_takes_rates(make_toy):
    model = make_toy()
    outer = SharpnessAware(model.parameters(), lr=0.1)
    controller = FreezeController(model, outer.base_optimizer, Factors({0: 0.0}), total_steps=STEPS, say=None)
    before = [model.body[index].weight.detach().clone() for index in (0, 3)]
    train_sharpness_aware(model, outer, controller)
    assert torch.equal(before[0], model.body[0].weight)
    assert not torch.equal(before[1], model.body[3].weight)


def test_steps_that_a_grad_scaler_skips_at_first_are_no_reason_to_warn(make_toy):
    model = make_toy()
    _, controller = controlled(model, Factors({0: 0.5}))
    for step in range(4):
        backward(model, step)
        controller.step()
        model.zero_grad()

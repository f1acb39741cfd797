"""What the user freezes and unfreezes is the user's: loops that do, as people write them."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FeatureCache, FreezeController, FreezePolicy, layers_of, make_policy
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 16 * 8).reshape(16, 8)
Y = torch.arange(16) % 2


class After(FreezePolicy):
    """Freezes some layers from a step on, and looks at nothing, as a policy by the clock."""

    def __init__(self, step, layers):
        self.step, self.layers, self.resting = step, frozenset(layers), []

    def decide(self, view):
        self.resting.append(view.resting)
        return self.layers if view.step >= self.step else frozenset()


def network(layers=3):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1)) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(8, 2))


def start(model, policy, total_steps=20, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return optimizer, FreezeController(model, optimizer, policy, total_steps=total_steps, say=None, **options)


def step(model, optimizer, controller):
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    event = controller.step()
    optimizer.zero_grad()
    return event


def trains(module):
    return all(parameter.requires_grad for parameter in module.parameters())


def rests(module):
    return not any(parameter.requires_grad for parameter in module.parameters())


def test_a_layer_that_the_user_holds_still_is_at_rest_until_it_is_opened():
    model, policy = network(), After(99, ())
    model[0].requires_grad_(False)
    optimizer, controller = start(model, policy)
    step(model, optimizer, controller)
    model[0].requires_grad_(True)
    step(model, optimizer, controller)
    assert policy.resting == [{0}, {0}, set()]


def test_a_frozen_layer_that_the_user_opens_trains_at_once_and_is_not_frozen_again():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(2, {0, 1}))
    for _ in range(3):
        step(model, optimizer, controller)
    assert controller.frozen == {0, 1}
    assert not model[0][1].training
    before = model[0][0].weight.clone()
    heard = []
    controller.on_change(heard.append)
    model[0].requires_grad_(True)
    event = step(model, optimizer, controller)
    assert (event.unfroze, event.frozen) == ((0,), (1,))
    assert heard == [event] == controller.history[-1:]
    assert not torch.equal(before, model[0][0].weight)
    assert model[0][1].training
    for _ in range(3):
        step(model, optimizer, controller)
    assert controller.frozen == {1}


def test_what_was_opened_stays_open_after_a_resume():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(2, {0, 1}))
    for number in range(5):
        if number == 3:
            model[0].requires_grad_(True)
        step(model, optimizer, controller)
    fresh = network()
    optimizer, resumed = start(fresh, After(2, {0, 1}))
    resumed.load_state_dict(controller.state_dict())
    step(fresh, optimizer, resumed)
    assert resumed.frozen == {1}


class ByScript(FreezePolicy):
    """Freezes what is written down for a step, and unfreezes all else."""

    unfreezes = True

    def __init__(self, answers):
        self.answers = answers

    def decide(self, view):
        return frozenset(self.answers.get(view.step, view.frozen))


def closes_a_layer(model, number):
    if number >= 2:
        model[0].requires_grad_(False)


def closes_a_layer_once(model, number):
    if number == 2:
        model[0].requires_grad_(False)


def closes_a_part(model, number):
    if number >= 2:
        model[0][0].weight.requires_grad_(False)


def opens_a_layer(model, number):
    model[0].requires_grad_(number >= 2)


def opens_a_layer_once(model, number):
    if number in (0, 2):
        model[0].requires_grad_(number == 2)


USERS = [closes_a_layer, closes_a_layer_once, closes_a_part, opens_a_layer, opens_a_layer_once]
AT_START = {0: {0, 1}, 2: (), 4: {0, 1}}
LATER = {4: {0, 1}}


@pytest.mark.filterwarnings("ignore:something switched frozen layer 0")
@pytest.mark.parametrize("answers", [AT_START, LATER])
@pytest.mark.parametrize("users", USERS)
def test_what_was_held_still_when_its_layer_froze_is_so_after_a_resume(users, answers):
    answers = answers | {7: {1}}

    def go_on(model, optimizer, controller, numbers):
        for number in numbers:
            if number % 2 == 0:  # at the start of each epoch
                users(model, number)
            torch.manual_seed(number)
            step(model, optimizer, controller)

    unbroken, first = ((model := network(), *start(model, ByScript(answers))) for _ in range(2))
    go_on(*unbroken, range(12))
    go_on(*first, range(6))
    model = network()
    if users in (opens_a_layer, opens_a_layer_once):
        users(model, 0)  # as at the start
    resumed = model, *start(model, ByScript(answers))
    for each, former in zip(resumed, first, strict=True):
        each.load_state_dict(copy.deepcopy(former.state_dict()))
    assert resumed[2].state_dict() == first[2].state_dict()
    go_on(*resumed, range(6, 12))
    assert resumed[2].history == unbroken[2].history
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in unbroken[0].parameters()]
    assert all(torch.equal(one, other) for one, other in zip(unbroken[0].parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("steps", [6, 20])
def test_a_release_after_a_resume_opens_what_trained_and_nothing_else(steps):
    model = network()
    optimizer, controller = start(model, After(4, {0, 1}))
    for number in range(steps):
        if number == 2:
            model[0].requires_grad_(False)
        step(model, optimizer, controller)
    fresh = network()
    resumed = start(fresh, After(4, {0, 1}))[1]
    resumed.load_state_dict(controller.state_dict())
    resumed.release()
    assert rests(fresh[0])
    assert trains(fresh[1])


@pytest.mark.parametrize("dry", [0, 1])
def test_a_state_of_or_for_a_dry_run_opens_and_closes_nothing(dry):
    first, second = network(), network()
    first[0].requires_grad_(False)
    second[1].requires_grad_(False)
    (_, one), (_, other) = (
        start(model, After(0, {0, 1}), dry_run=number == dry) for number, model in enumerate((first, second))
    )
    other.load_state_dict(one.state_dict())
    other.release()
    assert [trains(second[index]) for index in range(2)] == [True, False]


def test_a_layer_opened_and_closed_between_two_steps_stays_frozen():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(0, {0, 1}))
    model[0].requires_grad_(True)
    model[0].requires_grad_(False)
    step(model, optimizer, controller)
    assert controller.frozen == {0, 1}


def zeros_kept(model, optimizer, controller):
    """A step of a loop that fills gradients with zeros, and leaves them to what is closed afterwards."""
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad(set_to_none=False)


def zeros_set(model, optimizer, controller):
    """A step of a loop that makes zeros of missing gradients."""
    step_by_hand(model, optimizer, controller, average_by_hand)


@pytest.mark.parametrize("train", [zeros_kept, zeros_set])
def test_what_the_user_closes_in_mid_training_is_at_rest_though_its_gradient_is_zeros(train):
    model, policy = network(), After(99, ())
    optimizer, controller = start(model, policy)
    for number in range(4):
        if number == 2:
            model[0].requires_grad_(False)
        train(model, optimizer, controller)
    assert policy.resting == [set(), set(), set(), {0}, {0}]


@pytest.mark.filterwarnings("ignore:something sets .grad")
@pytest.mark.parametrize("train", [zeros_kept, zeros_set])
@pytest.mark.parametrize("closed", ["layer", "weight"])
def test_no_release_and_no_policy_opens_what_the_user_closed_where_gradients_are_zeros(closed, train):
    model = network()
    optimizer, controller = start(model, Script({6: {0, 1}, 9: {1}}))
    resting = model[0] if closed == "layer" else model[0][0].weight
    for number in range(12):
        if number == 3:
            resting.requires_grad_(False)
        if number == 7:  # it is frozen, and momentum moves it no more
            before = model[0][0].weight.detach().clone()
        train(model, optimizer, controller)
    assert controller.frozen == {1}
    controller.release()
    assert not model[0][0].weight.requires_grad
    assert model[0][0].bias.requires_grad == (closed == "weight")
    assert trains(model[1])
    if train is zeros_kept:
        assert torch.equal(before, model[0][0].weight)


@pytest.mark.parametrize("when", [0, 3])
def test_a_release_opens_what_the_controller_froze_and_nothing_else(when):
    model = network()
    optimizer, controller = start(model, After(6, {0, 1}))
    for number in range(8):
        if number == when:
            model[0].requires_grad_(False)
        step(model, optimizer, controller)
    assert controller.frozen == {0, 1}
    controller.release()
    assert rests(model[0])
    assert trains(model[1])


@pytest.mark.parametrize("name", ["static", "linear", "schedule", "autofreeze", "pipetransformer", "lisa"])
def test_no_policy_by_the_clock_freezes_again_what_is_released_in_mid_training(name):
    model = network(5)
    optimizer, controller = start(model, make_policy(name, **({"every": 5} if name == "lisa" else {})), total_steps=40)
    for _ in range(30):
        step(model, optimizer, controller)
    released = controller.frozen
    assert released
    controller.release()
    for _ in range(10):
        step(model, optimizer, controller)
        assert not controller.frozen & released


def test_what_is_released_in_mid_training_stays_open_after_a_resume():
    model = network()
    optimizer, controller = start(model, After(2, {0, 1}))
    for _ in range(5):
        step(model, optimizer, controller)
    controller.release()
    fresh = network()
    optimizer, resumed = start(fresh, After(2, {0, 1}))
    resumed.load_state_dict(controller.state_dict())
    step(fresh, optimizer, resumed)
    assert resumed.frozen == frozenset()


def test_a_release_opens_what_the_user_had_opened_before_it_froze():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(6, {0, 1}))
    for number in range(8):
        if number == 3:
            model[0].requires_grad_(True)
        step(model, optimizer, controller)
    controller.release()
    assert trains(model[0])


def test_biases_alone_freeze_and_come_back_alone():
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or name.startswith("3"))
    optimizer, controller = start(model, After(2, {0}))
    for _ in range(4):
        step(model, optimizer, controller)
    before = model[0][0].bias.clone()
    step(model, optimizer, controller)
    assert torch.equal(before, model[0][0].bias)
    controller.release()
    assert model[0][0].bias.requires_grad
    assert not model[0][0].weight.requires_grad
    assert model[0][1].training


def test_all_switched_on_every_epoch_opens_what_the_user_held_and_moves_nothing_else():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(2, {0, 1}))
    for _ in range(3):
        step(model, optimizer, controller)
    before = model[1][0].weight.clone()
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="frozen layer 1"):
        step(model, optimizer, controller)
    for _ in range(2):
        model.requires_grad_(True)
        step(model, optimizer, controller)
    assert torch.equal(before, model[1][0].weight)
    assert controller.frozen == {1}


def test_what_is_switched_on_in_every_step_gets_no_gradient_from_the_second_step_on():
    """As adapters are, where a model without them is its own reference."""
    model = network()
    optimizer, controller = start(model, After(0, {0, 1}))
    made = []
    for number in range(4):
        model.requires_grad_(True)
        hidden = []
        handle = model[1].register_forward_hook(lambda module, args, output, hidden=hidden: hidden.append(output))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if number == 0 else "error")
            step(model, optimizer, controller)
        handle.remove()
        made.append(hidden[0].requires_grad)
    assert made == [True, False, False, False]


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def optimizers(self):
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.generator, self.discriminator)]

    def layers(self):
        return layers_of(self, patterns=["generator.0", "generator.2", "discriminator.0", "discriminator.2"])

    def generate(self, optimizer):
        for parameter in self.discriminator.parameters():
            parameter.requires_grad = False
        optimizer.zero_grad()
        self.discriminator(self.generator(torch.randn(6, 4))).mean().backward()
        optimizer.step()

    def discriminate(self, optimizer):
        for parameter in self.discriminator.parameters():
            parameter.requires_grad = True
        optimizer.zero_grad()
        fake = self.generator(torch.randn(6, 4)).detach()
        (self.discriminator(torch.randn(6, 8)) - self.discriminator(fake)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("order", ["generator first", "discriminator first"])
def test_a_discriminator_that_is_switched_in_each_step_freezes_for_good(order):
    model = Adversarial()
    first, second = model.optimizers()
    controller = FreezeController(
        model, [first, second], After(3, {2}), total_steps=12, layers=model.layers(), say=None
    )
    passes = [(model.generate, first), (model.discriminate, second)]
    weights = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is switched back on
        for _ in range(12):
            for train, optimizer in passes if order == "generator first" else reversed(passes):
                train(optimizer)
            controller.step()
            weights.append(model.discriminator[0].weight.detach().clone())
    assert controller.frozen == {2}
    assert all(torch.equal(weights[2], weight) for weight in weights[3:])
    assert not torch.equal(weights[1], weights[2])
    controller.release()
    assert trains(model.discriminator[0])


def test_a_generator_that_trains_in_every_fifth_step_is_no_lost_gradient():
    model = Adversarial()
    first, second = model.optimizers()
    policy = After(5, {0})
    controller = FreezeController(model, [first, second], policy, total_steps=20, layers=model.layers(), say=None)
    for number in range(20):
        first.zero_grad()
        model.discriminate(second)
        if number % 5 == 4:
            model.generate(first)
            model.discriminator.requires_grad_(True)
        controller.step()
    assert controller.frozen == {0}


def average_by_hand(model, loss):
    """As all-reduce is often written by hand: each process needs a gradient of each parameter."""
    loss().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def combine_tasks(model, loss):
    """As PCGrad and the like are written."""
    gradients = []
    for _ in range(2):
        model.zero_grad()
        loss().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for parameter, first, second in zip(model.parameters(), *gradients, strict=True):
        parameter.grad = first + second


def ones(model, loss):
    """As estimated gradients are set."""
    loss().backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def step_by_hand(model, optimizer, controller, make, steps=1):
    for _ in range(steps):
        make(model, lambda: F.cross_entropy(model(X), Y))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()


def with_decay(model, policy):
    """Decay moves a weight whose gradient is zero."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    return optimizer, FreezeController(model, optimizer, policy, total_steps=40, say=None)


@pytest.mark.parametrize("make", [average_by_hand, combine_tasks, ones])
def test_gradients_that_are_set_by_hand_move_no_frozen_layer(make):
    model = network()
    optimizer, controller = with_decay(model, After(2, {0, 1}))
    step_by_hand(model, optimizer, controller, make, steps=2)
    before = [parameter.detach().clone() for parameter in model[:2].parameters()]
    with pytest.warns(UserWarning, match=r"sets .grad of frozen layer 0 .* by hand") as said:
        step_by_hand(model, optimizer, controller, make, steps=20)
    assert len(said) == 1
    assert all(map(torch.equal, before, model[:2].parameters()))
    assert not any(parameter in optimizer.state for parameter in model[:2].parameters())
    controller.release()
    step_by_hand(model, optimizer, controller, make)
    assert not torch.equal(before[0], model[0][0].weight)


def test_gradients_that_are_set_by_hand_only_later_move_a_frozen_layer_no_more_once_they_are_noticed():
    model = network()
    optimizer, controller = with_decay(model, After(2, {0}))
    for _ in range(10):
        step(model, optimizer, controller)
    with pytest.warns(UserWarning, match=r"sets .grad of frozen layer 0 .* by hand"):
        step_by_hand(model, optimizer, controller, average_by_hand, steps=3)
    before = model[0][0].weight.detach().clone()
    step_by_hand(model, optimizer, controller, average_by_hand, steps=20)
    assert torch.equal(before, model[0][0].weight)


def test_gradients_that_are_set_by_hand_move_what_the_user_has_opened():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = with_decay(model, After(2, {0, 1}))
    with pytest.warns(UserWarning, match=r"sets .grad of frozen layer 0 .* by hand"):
        step_by_hand(model, optimizer, controller, average_by_hand, steps=6)
    model[0].requires_grad_(True)
    before = [model[index][0].weight.detach().clone() for index in (0, 1)]
    step_by_hand(model, optimizer, controller, average_by_hand)
    assert [torch.equal(old, model[index][0].weight) for index, old in enumerate(before)] == [False, True]
    assert controller.frozen == {1}


def test_where_no_gradient_is_set_by_hand_no_optimizer_keeps_a_hook():
    model = network()
    optimizer, controller = with_decay(model, After(2, {0, 1}))
    for _ in range(6):
        step(model, optimizer, controller)
    assert not optimizer._optimizer_step_pre_hooks


def test_norms_that_no_optimizer_holds_yet_are_no_error_beside_weights_that_rest():
    model = network()
    model[0][0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1:].parameters(), 0.1)
    controller = FreezeController(model, optimizer, After(2, {0}), total_steps=20, say=None)
    for _ in range(3):
        step(model, optimizer, controller)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})
    before = model[0][0].weight.clone()
    step(model, optimizer, controller)
    assert not torch.equal(before, model[0][0].weight)
    assert controller.frozen == set()


def test_a_network_with_a_layer_that_the_user_may_still_open_is_not_finished():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(2, {0, 1, 2}))
    for _ in range(3):
        step(model, optimizer, controller)
    assert controller.frozen == {0, 1, 2}
    assert not controller.finished


@pytest.mark.parametrize("name", ["gradual", "lisa"])
def test_a_policy_that_unfreezes_opens_no_layer_of_the_users(name):
    model = network(4)
    model[0].requires_grad_(False)
    optimizer, controller = start(model, make_policy(name))
    for _ in range(20):
        step(model, optimizer, controller)
        assert rests(model[0])
    controller.release()
    assert rests(model[0])
    assert trains(model[1:])


def test_modes_come_back_as_they_were():
    class NormsInEvaluation(nn.Sequential):
        """As detectors override `train`."""

        def train(self, mode=True):
            super().train(mode)
            self[1][1].eval()
            return self

    model = NormsInEvaluation(*network()).train()
    model[0][1].eval()
    controller = start(model, After(0, {0, 1, 2}))[1]
    model[1].eval()
    model[2].eval()
    model[2].train()
    controller.release()
    norms = [block[1].training for block in model[:3]]
    assert norms == [False, False, True]
    assert not model[1][3].training
    assert model[2][3].training


def test_a_trainer_that_restores_flags_by_itself_changes_nothing():
    model = network().train()
    controller = start(model, After(0, {0, 1}))[1]
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, flag in flags:  # Lightning, after each validation
        module.training = flag
    assert not model[0][1].training
    controller.release()
    assert all(module.training for module in model.modules())


def test_a_model_that_starts_in_evaluation_mode_is_released_into_its_own():
    model = network().eval()
    controller = start(model, After(0, {0, 1}))[1]
    model.train()
    assert not model[0][1].training
    controller.release()
    assert all(module.training for module in model.modules())


def test_a_layer_whose_outputs_come_from_a_cache_is_given_back_when_it_is_opened():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, After(1, {0, 1}))
    cache = FeatureCache(controller)
    for number in range(10):
        if number == 6:
            model[0].requires_grad_(True)
        with cache.batch(range(16)):
            output = model(X)
        F.cross_entropy(output, Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert cache.hits
    assert [(event.step, event.unfroze) for event in controller.history] == [(1, ()), (7, (0,))]


def test_adapters_come_back_as_they_were_beside_a_reference_without_them():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["4"]))
    layers = layers_of(base, patterns=["0*", "2*"])
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    optimizer, controller = start(model, After(2, {0, 1}), layers=layers)
    moved = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(6):
            before = [parameter.detach().clone() for parameter in layers[0].parameters()]
            with torch.no_grad(), model.disable_adapter():
                reference = model(X)
            (F.cross_entropy(model(X), Y) + F.mse_loss(model(X), reference)).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            now = layers[0].parameters()
            moved.append(not all(torch.equal(old, new) for old, new in zip(before, now, strict=True)))
    assert moved == [True, True, False, False, False, False]
    assert controller.frozen == {0, 1}
    controller.release()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required


def test_a_layer_gets_its_own_rate_from_the_group_that_is_added_for_it():
    factors = []
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    policy = make_policy("freezeout", scaled=False)
    controller = FreezeController(model, optimizer, policy, total_steps=100, say=None)
    step(model, optimizer, controller)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    factors = policy.rates(controller.view)
    assert factors[0] == pytest.approx(factors[1], abs=0.01)  # each a multiple of its own group's rate
    before = model[0][0].weight.clone()
    F.cross_entropy(model(X), Y).backward()
    gradient = model[0][0].weight.grad.clone()
    factor = policy.rates(controller.view)[0]
    optimizer.step()
    assert torch.allclose(model[0][0].weight, before - factor * 0.01 * gradient, atol=1e-7)


def test_a_layer_that_is_opened_after_its_time_trains_at_the_rate_of_the_training():
    model = network()
    model[0].requires_grad_(False)
    optimizer, controller = start(model, make_policy("freezeout"), total_steps=20)
    for _ in range(15):
        step(model, optimizer, controller)
    assert 0 in controller.frozen
    model[0].requires_grad_(True)
    step(model, optimizer, controller)  # gives it back
    before = model[0][0].weight.detach().clone()
    step(model, optimizer, controller)
    assert not torch.equal(before, model[0][0].weight)


def test_what_a_layer_costs_is_counted_anew_when_it_is_opened():
    model = network()
    model[:3].requires_grad_(False)
    optimizer, controller = start(model, make_policy("greentrainer", rounds=2), total_steps=20)
    for _ in range(10):
        step(model, optimizer, controller)
    flops = controller.view.flops
    assert flops.share(frozenset({0, 1, 2})) == 1
    model.requires_grad_(True)
    for _ in range(3):
        step(model, optimizer, controller)
    assert controller.view.flops.share(frozenset({0, 1, 2})) < 0.5
    assert controller.frozen < {0, 1, 2}

"""When policies are asked, and how their answers are carried out."""

import copy
import gc
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from predictor import FreezeController, FreezeEvent, FreezePolicy, Layer, layers_of, make_policy
from predictor.errors import UsageError

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Script(FreezePolicy):
    """Answers what the test wrote down for each step."""

    def __init__(self, answers, every=1):
        self.answers, self.every, self.asked, self.observed = answers, every, [], []

    def observe(self, view):
        self.observed.append((view.step, view.layers[-1].own[0].grad is not None))

    def decide(self, view):
        self.asked.append(view.step)
        return frozenset(self.answers.get(view.step, view.frozen))


def start(model, policy, total_steps=4, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, FreezeController(model, optimizer, policy, total_steps=total_steps, **options)


def step(model, optimizer, controller):
    torch.manual_seed(0)  # the same dropout every time
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    event = controller.step()
    optimizer.zero_grad()
    return event


def test_a_policy_is_asked_before_the_first_step_and_then_at_its_cadence(make_toy):
    model, policy = make_toy(), Script({}, every=2)
    optimizer, controller = start(model, policy)
    for _ in range(4):
        step(model, optimizer, controller)
    assert policy.asked == [0, 2, 4]
    assert policy.observed == [(1, True), (2, True), (3, True), (4, True)]


def test_events_say_what_changed(make_toy):
    model = make_toy()
    optimizer, controller = start(model, Script({1: {0, 2}, 3: {0}}))
    heard = []
    controller.on_change(heard.append)
    events = [step(model, optimizer, controller) for _ in range(4)]
    assert [event and (event.froze, event.unfroze, event.frozen) for event in events] == [
        ((0, 2), (), (0, 2)),
        None,
        ((), (2,), (0,)),
        None,
    ]
    assert controller.history == heard == [event for event in events if event]
    assert str(events[0]) == "step 1: froze 0, 2 (2 of 3 layers frozen)"
    assert str(events[2]) == "step 3: unfroze 2 (1 of 3 layers frozen)"


def test_a_policy_may_freeze_before_the_first_step(make_toy):
    model = make_toy()
    before = model.body[0].weight.detach().clone()
    optimizer, controller = start(model, make_policy("static", layers=2))
    assert controller.frozen == {0, 1}
    step(model, optimizer, controller)
    assert torch.equal(before, model.body[0].weight)


def test_all_layers_frozen_leaves_the_head_training(make_toy):
    model = make_toy()
    before = model.head.weight.detach().clone()
    optimizer, controller = start(model, make_policy("static", share=1.0))
    step(model, optimizer, controller)
    assert not torch.equal(before, model.head.weight)


def test_a_training_is_finished_once_all_layers_are_frozen_after_its_start(make_toy):
    model = make_toy()
    optimizer, controller = start(model, Script({1: {0, 1}, 2: {0, 1, 2}, 3: {0}}))
    finished = []
    for _ in range(3):
        step(model, optimizer, controller)
        finished.append(controller.finished)
    assert finished == [False, True, False]
    unfreezing = Script({1: {0, 1, 2}})
    unfreezing.unfreezes = True
    optimizer, never = start(model := make_toy(), unfreezing)
    step(model, optimizer, never)
    assert (len(never.frozen), never.finished) == (3, False)
    again = start(make_toy(), Script({}))[1]
    again.load_state_dict(controller.state_dict() | {"frozen": [0, 1, 2]})
    assert again.finished


@pytest.mark.parametrize("layers", [None, ()])
def test_what_has_trained_nothing_is_not_finished(make_toy, layers):
    model = make_toy()
    optimizer, controller = start(model, make_policy("static", share=1.0), layers=layers)
    step(model, optimizer, controller)
    assert not controller.finished


@pytest.mark.parametrize("total_steps", [0, -3])
def test_total_steps_below_one_is_refused(make_toy, total_steps):
    with pytest.raises(UsageError, match=f"total_steps={total_steps}: give the number of optimizer steps"):
        start(make_toy(), make_policy("none"), total_steps=total_steps)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_layer_that_does_not_exist_is_refused(make_toy, index):
    with pytest.raises(UsageError, match=f"Script wants to freeze layer {index} of 3"):
        start(make_toy(), Script({0: {index}}))


def test_an_optimizer_without_a_layers_parameters_is_refused(make_toy):
    model = make_toy()
    with pytest.raises(UsageError, match=r"'body\.0' has parameters that no optimizer holds"):
        FreezeController(model, torch.optim.SGD(model.head.parameters(), 0.1), make_policy("none"), total_steps=1)


def test_several_optimizers_are_taken(make_toy):
    model = make_toy()
    pair = [torch.optim.SGD(model.body.parameters(), 0.1), torch.optim.AdamW(model.head.parameters(), 0.1)]
    controller = FreezeController(model, pair, Script({1: {0}}), total_steps=2)
    F.cross_entropy(model(X), Y).backward()
    for optimizer in pair:
        optimizer.step()
    controller.step()
    assert controller.frozen == {0}


class Noam:
    """A learning rate schedule around an optimizer, as in many a transformer's training loop."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (Noam, "Noam"),
        (lambda optimizer: {"body": optimizer}, "dict"),
        (lambda optimizer: [optimizer, None], "NoneType"),
        (lambda optimizer: None, "NoneType"),
        (lambda optimizer: [], "no optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused_by_its_type(make_toy, wrap, named):
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match=f"{named}.*give a torch.optim.Optimizer"):
        FreezeController(model, wrap(optimizer), make_policy("none"), total_steps=1)


def test_what_user_code_switches_on_is_frozen_again_before_it_moves_and_said_once(make_toy):
    model = make_toy()
    optimizer, controller = start(model, make_policy("static", layers=1), total_steps=9)
    step(model, optimizer, controller)
    before = model.body[0].weight.clone()
    messages = []
    controller.on_moved(lambda: messages.append(controller.frozen))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"switched frozen layer 0 \(body.0\) back on"):
        step(model, optimizer, controller)
    assert not model.body[0].weight.requires_grad
    assert messages == [{0}]
    assert len(controller.history) == 1  # it is no change of what is frozen
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    step(model, optimizer, controller)  # a second warning would be an error here
    assert not model.body[0].weight.requires_grad
    assert torch.equal(before, model.body[0].weight)
    assert messages == [{0}]  # this time it was frozen again before the pass


def test_a_gradient_set_by_hand_is_noticed_at_the_next_look(make_toy):
    model = make_toy()
    optimizer, controller = start(model, make_policy("static", layers=1), total_steps=999)
    step(model, optimizer, controller)
    model.body[0].weight.grad = torch.ones_like(model.body[0].weight)
    with pytest.warns(UserWarning, match=r"sets .grad of frozen layer 0 \(body.0\) by hand"):
        any(controller.step() for _ in range(100))
    assert model.body[0].weight.grad is None


class Quiet(FreezePolicy):
    """Freezes two layers at step 2, and is asked every 50 steps."""

    def due(self, step, total_steps):
        return step == 2 or step % 50 == 0

    def decide(self, view):
        return frozenset({0, 1} if view.step >= 2 else ())


def test_a_step_after_a_freeze_looks_at_no_parameter(make_toy, monkeypatch):
    model = make_toy()
    optimizer, controller = start(model, Quiet(), total_steps=2000, say=None)
    looked, parameters = [], Layer.parameters
    monkeypatch.setattr(Layer, "parameters", lambda layer: looked.append(layer) or parameters(layer))
    for _ in range(8):
        step(model, optimizer, controller)
    assert controller.frozen == {0, 1}
    seconds, count = controller.seconds, len(looked)
    assert count > 0
    for _ in range(40):
        step(model, optimizer, controller)
    assert len(looked) == count
    assert controller.seconds == seconds  # nothing but a comparison was done


def test_after_its_last_step_or_without_its_controller_a_model_is_the_users(make_toy):
    for end in ("last step", "close", "gone"):
        model = make_toy()
        optimizer, controller = start(
            model, make_policy("static", layers=1), total_steps=1 if end == "last step" else 9
        )
        step(model, optimizer, controller)
        if end == "close":
            controller.close()
        if end == "gone":
            del controller
            gc.collect()
        model.requires_grad_(True)
        F.cross_entropy(model(X), Y).backward()  # a warning would be an error
        assert model.body[0].weight.grad is not None, end


def test_a_dry_run_reports_and_changes_nothing(make_toy):
    answers, weights = {0: {0}, 2: {0, 1}}, []
    for policy in (Script(answers), make_policy("none")):
        lines, model = [], make_toy()
        optimizer, controller = start(model, policy, dry_run=True, say=lines.append)
        for _ in range(4):
            step(model, optimizer, controller)
        weights.append(model.state_dict())
        assert controller.frozen == frozenset()
        assert not controller.finished
        assert [(event.step, event.frozen) for event in controller.history] == [
            (at, tuple(sorted(frozen))) for at, frozen in answers.items() if policy.freezes
        ]
        assert len([line for line in lines if line.startswith("dry run, step")]) == len(controller.history)
        assert all("dry run" in line for line in lines)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_former_names_still_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="unfreezes"):

        class Former(FreezePolicy):
            thaws = True

            def decide(self, view):
                return frozenset()

    assert Former().unfreezes
    own = Script({})
    with pytest.warns(DeprecationWarning, match="unfreezes"):
        own.thaws = True
    with pytest.warns(DeprecationWarning, match="unfreezes"):
        assert own.thaws
    assert own.unfreezes
    with pytest.warns(DeprecationWarning, match="unfroze"):
        assert FreezeEvent(1, (), (2,), (0,), 3).thawed == (2,)


def test_events_keep_their_keys_on_disk():
    event = FreezeEvent(3, (1,), (2,), (0, 1), 4)
    row = event.as_dict()
    assert row == {"step": 3, "froze": [1], "thawed": [2], "frozen": [0, 1], "layers": 4}
    assert FreezeEvent.from_dict(row) == event


def test_layers_that_an_earlier_controller_left_frozen_are_warned_of(make_toy):
    model = make_toy()
    earlier = start(model, make_policy("static", layers=2))[1]
    message = r"2 of 3 layers, the first 'body\.0', were left frozen by an earlier controller.* call release\(\)"
    with pytest.warns(UserWarning, match=message):
        start(model, make_policy("none"))
    earlier.release()
    start(model, make_policy("none"))  # a warning would be an error here, and below


def test_listeners_are_called_at_a_release(make_toy):
    controller = start(make_toy(), make_policy("static", layers=2))[1]
    heard = []
    controller.on_change(heard.append)
    controller.release()
    controller.release()
    assert [(event.unfroze, event.frozen) for event in heard] == [((0, 1), ())]
    assert controller.frozen == frozenset()


def test_steps_beyond_those_that_were_announced_are_warned_of_once(make_toy):
    model = make_toy()
    optimizer, controller = start(model, make_policy("none"), total_steps=2)
    step(model, optimizer, controller)
    step(model, optimizer, controller)
    with pytest.warns(UserWarning, match=r"this is step 3, and total_steps=2.* len\(loader\) \* epochs"):
        step(model, optimizer, controller)
    step(model, optimizer, controller)  # a second warning would be an error


def test_what_the_user_holds_still_is_no_left_over(make_toy):
    model = make_toy()
    model.body[:6].eval().requires_grad_(False)
    earlier = start(model, make_policy("static", layers=1))[1]
    earlier.release()
    start(model, make_policy("none"))


def test_released_layers_that_the_optimizer_does_not_hold_are_refused(make_toy):
    model = make_toy()
    earlier = start(model, make_policy("static", layers=2))[1]
    # As Transformers' Trainer makes it.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    earlier.release()
    with pytest.raises(UsageError, match=r"'body\.0' has parameters that no optimizer holds"):
        FreezeController(model, optimizer, make_policy("none"), total_steps=4)


def test_state_of_another_model_or_length_is_refused(make_toy):
    model = make_toy()
    _, controller = start(model, make_policy("none"))
    state = controller.state_dict()
    with pytest.raises(UsageError, match=r"the first that differs: 'stem' there, 'body\.0' here"):
        controller.load_state_dict({**state, "layers": ["stem", "body.3", "body.8"]})
    with pytest.raises(UsageError, match="of 7 steps, and total_steps=4"):
        controller.load_state_dict({**state, "total_steps": 7})


class Block(nn.Module):
    """Two linear layers and two norms, defined in one order and used in another."""

    def __init__(self, defined, used, kind=nn.LayerNorm):
        super().__init__()
        self.used = used
        for name in defined:
            self.add_module(name, kind(8) if name.startswith("norm") else nn.Linear(8, 8))

    def forward(self, x):
        inner = x
        for name in self.used:
            inner = getattr(self, name)(inner)
        return x + inner


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1)


BLOCKS = {
    "transformer": encoder,
    "norms in front and first": lambda: Block(["norm1", "norm2", "one", "two"], ["norm1", "one", "norm2", "two"]),
    "norms in front and last": lambda: Block(["one", "two", "norm1", "norm2"], ["norm1", "one", "norm2", "two"]),
    "norms behind and last": lambda: Block(["one", "two", "norm1", "norm2"], ["one", "norm1", "two", "norm2"]),
    "norms with statistics": lambda: Block(
        ["one", "two", "norm1", "norm2"], ["one", "norm1", "two", "norm2"], nn.BatchNorm1d
    ),
}


def of_blocks(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), make(), make(), nn.Linear(8, 3))


def held(controller):
    """What each layer holds, by name."""
    parts = [*controller.model.named_parameters(), *controller.model.named_modules()]
    name_of = {id(part): name for name, part in parts}
    return [{name_of[id(part)] for part in (*layer.own, *layer.modules)} for layer in controller.layers]


def resumed_from(state, optimizer, weights, make, policy, **options):
    model = make()
    model.load_state_dict(weights)
    again, controller = start(model, policy, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    controller.load_state_dict(copy.deepcopy(state))
    return model, again, controller


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resumed_training_freezes_the_same_parameters_where_names_alone_do_not_tell_them(block):
    model, answers = of_blocks(BLOCKS[block]), {2: {0, 1}}
    optimizer, controller = start(model, Script(answers), total_steps=6, say=None)
    as_defined = [layer.name for layer in controller.layers], held(controller)
    for _ in range(3):
        step(model, optimizer, controller)
    assert as_defined[0] == [layer.name for layer in controller.layers]
    assert as_defined[1] != held(controller)
    state, weights = controller.state_dict(), copy.deepcopy(model.state_dict())
    twin, again, resumed = resumed_from(
        state, optimizer, weights, lambda: of_blocks(BLOCKS[block]), Script(answers), total_steps=6, say=None
    )
    assert held(resumed) == held(controller)
    assert resumed.state_dict() == state
    for _ in range(3):
        step(model, optimizer, controller)
        step(twin, again, resumed)
        assert held(resumed) == held(controller)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]


class ByTurns(nn.Module):
    """Calls its last part in front of the others in every second pass."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.turned = True

    def forward(self, x):
        x = x.flatten(1)[:, :8]
        self.turned = not self.turned
        return self.head(self.one(self.two(x)) if self.turned else self.two(self.one(x)))


def test_a_resumed_training_keeps_its_layers_whatever_its_first_pass_shows():
    torch.manual_seed(0)
    model = ByTurns()
    optimizer, controller = start(model, Script({1: {0}}), total_steps=6, say=None)
    step(model, optimizer, controller)
    again = ByTurns()
    again.turned = False
    optimizer, resumed = start(again, Script({}), total_steps=6, say=None)
    resumed.load_state_dict(controller.state_dict())
    step(again, optimizer, resumed)
    assert [layer.name for layer in resumed.layers] == [layer.name for layer in controller.layers] == ["one", "two"]
    assert not again.one.weight.requires_grad


def test_a_state_of_before_that_has_names_alone_waits_for_the_first_pass():
    model = of_blocks(encoder)
    optimizer, controller = start(model, Script({1: {0, 1}}), say=None)
    step(model, optimizer, controller)
    state = controller.state_dict()
    del state["members"]
    twin = of_blocks(encoder)
    resumed = start(twin, Script({}), say=None)[1]
    resumed.load_state_dict(state)
    twin(X)
    assert resumed.frozen == {0, 1}
    assert held(resumed) == held(controller)


def test_a_state_of_before_the_first_step_leaves_the_layers_that_a_pass_has_shown():
    model = of_blocks(encoder)
    optimizer, controller = start(model, Script({}), say=None)
    state = controller.state_dict()
    step(model, optimizer, controller)
    shown = held(controller)
    controller.load_state_dict(state)
    assert held(controller) == shown


def test_a_state_of_layers_that_hold_other_parameters_than_those_given_is_refused():
    model = of_blocks(encoder)
    optimizer, controller = start(model, Script({}), say=None)
    step(model, optimizer, controller)
    twin = of_blocks(encoder)
    given = start(twin, Script({}), layers=layers_of(twin), say=None)[1]
    with pytest.raises(UsageError, match=r"'2\.norm1\.weight' belongs to '2\.self_attn' there.*layers="):
        given.load_state_dict(controller.state_dict())


class Words(nn.Module):
    """Takes texts of any length, which cost otherwise."""

    def __init__(self):
        super().__init__()
        self.words, self.encoder, self.head = nn.Embedding(9, 8), encoder(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.words(x)).mean(1))


class Counted(Script):
    """Notes what a step costs, and nothing else."""

    wants_flops = True

    def observe(self, view):
        self.observed.append(view.flops)


def read(model, optimizer, controller, length):
    F.cross_entropy(model(torch.arange(6 * length).reshape(6, length) % 9), Y).backward()
    optimizer.step()
    controller.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("opened", [None, 1, 3])
def test_costs_stay_those_of_the_unbroken_training_though_the_next_batch_is_of_another_shape(opened, tmp_path):
    def made():
        model = Words()
        model.words.requires_grad_(opened is None)
        return model, *start(model, Counted({}), total_steps=8, say=None)

    def go_on(model, optimizer, controller, steps):
        for number in steps:
            if number == opened:
                model.words.requires_grad_(True)
            read(model, optimizer, controller, 2 + 3 * number)

    training = made()
    go_on(*training, range(5))
    torch.save(training[2].state_dict(), tmp_path / "state.pt")
    resumed = made()
    resumed[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed[2].view.flops == training[2].view.flops
    if opened is not None:
        resumed[0].words.requires_grad_(True)  # by the user's code, as at each start of an epoch
    for each in (training, resumed):
        go_on(*each, range(5, 8))
    assert resumed[2].policy.observed == training[2].policy.observed[5:]


def test_a_state_without_costs_has_them_counted(make_toy):
    state = start(make_toy(), Script({}))[1].state_dict()
    assert not state.pop("costs")
    optimizer, controller = start(model := make_toy(), Counted({}))
    controller.load_state_dict(state | {"step": 1})
    step(model, optimizer, controller)
    assert controller.view.flops is not None


def test_loading_unfreezes_what_the_state_does_not_freeze_and_keeps_loaded_momentum(make_toy):
    model = make_toy()
    optimizer, controller = start(model, Script({0: {0}, 1: ()}))
    for _ in range(2):
        step(model, optimizer, controller)
    twin = make_toy(seed=1)
    fresh = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    twin.load_state_dict(model.state_dict())
    fresh.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    )  # before the controller is made: the order does not matter
    resumed = FreezeController(twin, fresh, Script({0: {0}, 1: ()}), total_steps=4)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.frozen == frozenset()
    assert twin.body[0].weight.requires_grad
    step(model, optimizer, controller)
    step(twin, fresh, resumed)
    step(model, optimizer, controller)
    step(twin, fresh, resumed)
    assert model.body[0].weight.allclose(twin.body[0].weight)


@pytest.mark.parametrize("stop", [2, 4])
def test_distributed_checkpoints_of_an_optimizer_load_after_the_controllers_state(stop, make_toy):
    answers = {0: {2}, 1: {0, 1}, 3: {1}}
    model, twin = make_toy(), make_toy(seed=1)
    optimizer, controller = start(model, Script(answers), total_steps=6)
    for _ in range(stop):
        step(model, optimizer, controller)
    again, resumed = start(twin, Script(answers), total_steps=6)
    states = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
    resumed.load_state_dict(controller.state_dict())
    set_model_state_dict(twin, states[0])
    set_optimizer_state_dict(twin, again, states[1])
    for _ in range(6 - stop):
        step(model, optimizer, controller)
        step(twin, again, resumed)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_time_spent_is_counted(make_toy):
    model = make_toy()
    optimizer, controller = start(model, make_policy("none"))
    before = controller.seconds
    step(model, optimizer, controller)
    assert controller.seconds > before > 0


@pytest.mark.parametrize("kind", [np.int64(12), np.float64(12.0), torch.tensor(12), 12.0], ids=lambda kind: repr(kind))
def test_a_whole_number_of_steps_of_any_kind_can_be_saved(kind, make_toy, tmp_path):
    controller = controlled_with(make_toy(), kind)
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    controlled_with(make_toy(), 12).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("odd", [0, -1, None, "12", math.inf, math.nan, 12.5])
def test_what_is_no_number_of_steps_is_refused(odd, make_toy):
    with pytest.raises(UsageError, match=r"total_steps=.*give the number of optimizer steps"):
        controlled_with(make_toy(), odd)


def controlled_with(model, total_steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return FreezeController(model, optimizer, make_policy("none"), total_steps=total_steps, say=None)


class Consumes(nn.Module):
    """Pops its batch's labels, scales its images in place, and counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.calls, self.state = nn.Linear(4, 4), nn.Linear(4, 2), [], None

    def forward(self, batch):
        labels, images = batch.pop("labels"), batch["images"]
        images.div_(2)
        hidden = self.body(images) if self.state is None else self.body(images) + self.state
        self.state = hidden.detach().mean()
        self.calls.append(len(images))
        return nn.functional.cross_entropy(self.head(hidden), labels)


def test_counting_what_a_freeze_saves_touches_neither_inputs_nor_what_the_model_keeps():
    losses, models = [], []
    for say in (None, lambda line: None):
        torch.manual_seed(0)
        model = Consumes()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        layers = [layer for layer in layers_of(model) if layer.name == "body"]
        controller = FreezeController(model, optimizer, Script({0: {0}}), total_steps=4, layers=layers, say=say)
        torch.manual_seed(1)
        own = []
        for _ in range(4):
            loss = model({"images": torch.randn(6, 4), "labels": torch.randint(2, (6,))})
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
        models.append(model)
    assert losses[0] == losses[1]
    assert models[0].calls == models[1].calls == [6] * 4

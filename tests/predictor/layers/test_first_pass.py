"""What the head is in anybody's training: seen in the first pass that the training makes itself."""

import copy
import itertools
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor.controller import FreezeController
from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies import make_policy

X = torch.linspace(-1, 1, 24).reshape(4, 6)
Y = torch.tensor([0, 1, 2, 0])


def network(*widths):
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())))[:-1]


def sgd(*modules):
    return [torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1) for module in modules]


def train(model, loss_of, optimizers=None, steps=4, policy=None):
    """Train with all layers frozen from the start, and return the names of the layers."""
    optimizers = optimizers or sgd(model)
    policy = policy or make_policy("static", share=1.0)
    controller = FreezeController(model, optimizers, policy, total_steps=steps, say=None)
    moved = {}
    for _ in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        controller.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    controller.close()
    return [layer.name for layer in controller.layers], {name.rpartition(".")[0] for name in moved}


class HeadFirst(nn.Module):
    """Defined from back to front."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(5, 3), network(6, 5, 5)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_head_that_is_defined_first_is_seen():
    assert train(HeadFirst(), lambda model: F.cross_entropy(model(X), Y)) == (["body.0", "body.2"], {"head"})


@dataclass
class Answers:
    classes: torch.Tensor
    value: torch.Tensor


class ActorCritic(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.trunk, self.actor, self.critic = network(6, 5, 5), network(5, 5, 3), nn.Linear(5, 1)
        self.answer = answer

    def forward(self, x):
        features = self.trunk(x)
        return self.answer(self.actor(features), self.critic(features))


@pytest.mark.parametrize("answer", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}, Answers])
def test_of_several_heads_each_is_one(answer):
    def loss_of(model):
        out = model(X)
        classes, value = (out.classes, out.value) if isinstance(out, Answers) else getattr(out, "values", lambda: out)()
        return F.cross_entropy(classes, Y) + value.square().mean()

    layers, moved = train(ActorCritic(answer), loss_of)
    assert layers == ["trunk.0", "trunk.2", "actor.0"]
    assert moved == {"actor.2", "critic"}


class WithLoss(nn.Module):
    """Returns the loss, as Transformers' models do, with a second head that it does not hang on."""

    def __init__(self):
        super().__init__()
        self.unused, self.head, self.body = nn.Linear(5, 2), nn.Linear(5, 3), network(6, 5, 5)

    def forward(self, x, y):
        features = self.body(x)
        return {"loss": F.cross_entropy(self.head(features), y), "aside": self.unused(features)}


def test_a_loss_that_is_returned_is_followed_to_what_it_hangs_on():
    layers, moved = train(WithLoss(), lambda model: model(X, Y)["loss"])
    assert layers == ["body.0", "body.2"]
    assert moved == {"head"}


class Distilled(nn.Module):
    def __init__(self, teacher_first, held=True):
        super().__init__()
        for name in ("teacher", "student") if teacher_first else ("student", "teacher"):
            setattr(self, name, network(6, 5, 5, 3))
        self.teacher.requires_grad_(not held)

    def forward(self, x, y):
        with torch.no_grad():
            wanted = self.teacher(x)
        logits = self.student(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, wanted)


@pytest.mark.parametrize("teacher_first", [True, False])
def test_a_teacher_has_no_part_in_it(teacher_first):
    layers, moved = train(Distilled(teacher_first), lambda model: model(X, Y))
    assert layers == ["student.0", "student.2"]
    assert moved == {"student.4"}


@pytest.mark.parametrize("teacher_first", [True, False])
def test_nor_where_the_loop_calls_both(teacher_first):
    def loss_of(model):
        with torch.no_grad():
            wanted = model.teacher(X)
        return F.mse_loss(model.student(X), wanted)

    layers, moved = train(Distilled(teacher_first), loss_of)
    assert layers == ["student.0", "student.2"]
    assert moved == {"student.4"}


class Encoder(nn.Module):
    """With all that an evaluation mode would change, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(6))
        self.body = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.1))
        self.last = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False))

    def forward(self, x):
        return self.last(self.body(x + self.token))


class Momentum(nn.Module):
    """A network beside an average of itself, as BYOL, MoCo and Mean Teacher have it."""

    def __init__(self, order):
        super().__init__()
        self.student, self.teacher, self.head = Encoder(), Encoder().requires_grad_(False), nn.Linear(4, 4)
        self.order = order

    @torch.no_grad()
    def follow(self):
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.data = ours.data * 0.9 + theirs.data * 0.1

    @torch.no_grad()
    def taught(self, x):
        if self.order == "it follows in the pass":
            self.follow()
        return self.teacher(x)

    def forward(self, x):
        if self.order == "teacher first":
            wanted = self.taught(x)
            return F.mse_loss(self.head(self.student(x)), wanted)
        features = self.student(x)
        if self.order == "teacher last":
            return F.mse_loss(self.head(features), self.taught(x))
        wanted = self.taught(x)
        return F.mse_loss(self.head(features), wanted)


class TaughtAside(Momentum):
    def forward(self, x):
        return self.head(self.student(x))


class TaughtByTheLoop(Momentum):
    def forward(self, x):
        raise AssertionError("the loop calls what is inside")


def train_beside_a_teacher(model, loss_of):
    """Train with all layers frozen from the start, while the teacher follows without an operator that writes to it."""
    optimizers = sgd(model)
    policy = make_policy("static", share=1.0)
    controller = FreezeController(model, optimizers, policy, total_steps=30, say=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            loss_of(model).backward()
            optimizers[0].step()
            controller.step()
            optimizers[0].zero_grad()
            model.follow()
            model.train()
            assert all(module.training for module in model.teacher.modules())
            assert not model.student.body[2].training
    assert model.teacher.body[2].num_batches_tracked == 12
    return {id(module) for layer in controller.layers for module in layer.modules}, controller


TEACHERS = ["teacher first", "teacher last", "between", "it follows in the pass"]


@pytest.mark.parametrize("order", TEACHERS)
def test_a_teacher_goes_on_as_it_is_when_its_student_freezes(order):
    model = Momentum(order)
    modules, controller = train_beside_a_teacher(model, lambda model: model(X))
    assert [layer.name for layer in controller.layers] == ["student.body.1", "student.last.0"]
    assert modules.isdisjoint(map(id, model.teacher.modules()))
    assert {id(p) for layer in controller.layers for p in layer.own} == set(map(id, model.student.parameters()))


@pytest.mark.parametrize("teacher_first", [True, False])
def test_so_does_one_that_the_loop_calls(teacher_first):
    def loss_of(model):
        wanted = model.taught(X) if teacher_first else None
        answer = model.head(model.student(X))
        return F.mse_loss(answer, model.taught(X) if wanted is None else wanted)

    model = TaughtByTheLoop("")
    modules, controller = train_beside_a_teacher(model, loss_of)
    assert [layer.name for layer in controller.layers] == ["student.body.1", "student.last.0"]
    assert modules.isdisjoint(map(id, model.teacher.modules()))


def test_so_does_one_that_the_first_pass_does_not_run():
    model = TaughtAside("")
    modules, _ = train_beside_a_teacher(model, lambda model: F.mse_loss(model(X), model.taught(X)))
    assert modules.isdisjoint(map(id, model.teacher.modules()))


class Pretrained(nn.Module):
    """The loop calls its parts. The body is at rest until it is opened."""

    def __init__(self):
        super().__init__()
        self.body, self.head = network(6, 5, 5).requires_grad_(False), network(5, 4, 3)


def test_what_is_at_rest_and_evaluated_before_the_training_has_its_layers():
    model = Pretrained()
    optimizers = sgd(model)
    controller = FreezeController(model, optimizers, make_policy("none"), total_steps=4, say=None)
    with torch.no_grad():
        model.head(model.body(X))
    model.head(model.body(X)).sum().backward()
    optimizers[0].step()
    controller.step()
    assert "body.0" in [layer.name for layer in controller.layers]


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = network(4, 5, 6), network(6, 5, 1)

    def forward(self, noise):
        return self.discriminator(self.generator(noise))


def play(model):
    made = model.generator(torch.ones(4, 4))
    real, fake = model.discriminator(X), model.discriminator(made.detach())
    return model.discriminator(made).mean() + (real - fake).mean()


def test_each_network_with_an_optimizer_of_its_own_has_a_head():
    model = Adversarial()
    layers, moved = train(model, play, sgd(model.generator, model.discriminator))
    assert layers == ["generator.0", "discriminator.0"]
    assert moved == {"generator.2", "discriminator.2"}


def test_matrices_and_the_rest_in_two_optimizers_are_one_network():
    model = HeadFirst()
    matrices = [model.body[0].weight, model.body[2].weight]
    rest = [p for p in model.parameters() if all(p is not each for each in matrices)]
    optimizers = [torch.optim.SGD(matrices, 0.1), torch.optim.SGD(rest, 0.1)]
    layers, _ = train(model, lambda model: F.cross_entropy(model(X), Y), optimizers)
    assert layers == ["body.0", "body.2"]


class Coder(nn.Module):
    """Never called itself: the loop calls encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.decoder, self.mean, self.spread, self.encoder = (
            network(2, 5, 6),
            *(nn.Linear(5, 2),) * 1,
            nn.Linear(5, 2),
            network(6, 5, 5),
        )


def coded(model, x=X):
    features = model.encoder(x).tanh()
    mean, spread = model.mean(features), model.spread(features)
    return F.mse_loss(model.decoder(mean + spread.exp()), x) + mean.square().mean()


def test_what_feeds_another_module_that_the_loop_calls_is_no_head():
    layers, moved = train(Coder(), coded)
    assert layers == ["encoder.0", "encoder.2", "mean", "spread", "decoder.0"]
    assert moved == {"decoder.2"}


class Variational(Coder):
    def forward(self, x):
        features = self.encoder(x).tanh()
        mean, spread = self.mean(features), self.spread(features)
        if self.training:
            mean = mean + spread.exp() * torch.randn_like(mean)
        return self.decoder(mean), mean, spread


def test_what_computes_otherwise_in_training_is_seen_in_training():
    layers, moved = train(Variational(), lambda model: F.mse_loss(model(X)[0], X))
    assert layers == ["encoder.0", "encoder.2", "mean", "spread", "decoder.0"]
    assert moved == {"decoder.2"}


class Cycle(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back = network(6, 5, 6), network(6, 5, 6)


def test_networks_that_feed_each_other_keep_their_heads():
    def loss_of(model):
        there, back = model.there(X), model.back(X)
        return F.mse_loss(model.back(there), X) + F.mse_loss(model.there(back), X)

    layers, moved = train(Cycle(), loss_of)
    assert layers == ["there.0", "back.0"]
    assert moved == {"there.2", "back.2"}


class Task(nn.Module):
    """Calls its network in a method, as a Lightning module does."""

    def __init__(self):
        super().__init__()
        self.net, self.metric = HeadFirst(), nn.Linear(2, 2).requires_grad_(False)

    def training_step(self):
        return F.cross_entropy(self.net(X), Y)


def test_a_network_that_a_method_calls_is_seen():
    layers, moved = train(Task(), lambda model: model.training_step())
    assert layers == ["net.body.0", "net.body.2"]
    assert moved == {"net.head"}


def test_a_forward_that_is_called_without_hooks_is_seen_by_its_modules():
    layers, moved = train(HeadFirst(), lambda model: F.cross_entropy(model.forward(X), Y))
    assert layers == ["body.0", "body.2"]
    assert moved == {"head"}


class Siamese(nn.Module):
    """Two views through one network, and a predictor for one of them; the other is a constant."""

    def __init__(self):
        super().__init__()
        self.predictor, self.projector, self.encoder = network(3, 4, 3), network(5, 4, 3), network(6, 5, 5)

    def forward(self, one, two):
        first, second = (self.projector(self.encoder(view)) for view in (one, two))
        return -F.cosine_similarity(self.predictor(first), second.detach()).mean()


def test_a_projector_that_feeds_a_predictor_is_a_layer():
    layers, moved = train(Siamese(), lambda model: model(X, X.flip(0)))
    assert layers == ["encoder.0", "encoder.2", "projector.0", "projector.2", "predictor.0"]
    assert moved == {"predictor.2"}


class Proposing(nn.Module):
    """As a detector: the first head's output is used without gradients by what follows, and in the loss."""

    def __init__(self):
        super().__init__()
        self.second, self.first, self.body = nn.Linear(7, 3), nn.Linear(5, 2), network(6, 5, 5)

    def forward(self, x, y):
        features = self.body(x)
        proposals = self.first(features)
        logits = self.second(torch.cat([features, proposals.detach()], dim=1))
        if self.training:
            return F.cross_entropy(logits, y) + proposals.square().mean()
        return logits


def test_a_head_whose_output_is_used_without_gradients_is_a_head():
    layers, moved = train(Proposing(), lambda model: model(X, Y))
    assert layers == ["body.0", "body.2"]
    assert moved == {"first", "second"}
    assert [layer.name for layer in layers_of(Proposing(), (X, Y))] == ["body.0", "body.2"]


class Recurrent(nn.Module):
    """One head at each step of time, from one cell."""

    def __init__(self):
        super().__init__()
        self.head, self.cell, self.embed = nn.Linear(5, 3), nn.GRUCell(5, 5), nn.Linear(6, 5)

    def forward(self, x):
        state, outputs = torch.zeros(len(x), 5), []
        for _ in range(3):
            state = self.cell(self.embed(x), state)
            outputs.append(self.head(state))
        return torch.stack(outputs)


def test_a_head_that_is_called_in_a_loop_is_one():
    layers, moved = train(Recurrent(), lambda model: model(X).square().mean())
    assert layers == ["embed", "cell"]
    assert moved == {"head"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.embed, self.body = nn.Linear(5, 7, bias=False), nn.Embedding(7, 5), network(5, 5, 5)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.body(self.embed(tokens)))


def test_what_is_tied_to_the_head_goes_on():
    layers, moved = train(Tied(), lambda model: F.cross_entropy(model(Y), Y))
    assert layers == ["body.0", "body.2"]
    assert moved == {"out", "embed"} - {"embed"}  # one parameter has one name


def test_nothing_in_the_head_trains_then_the_last_that_trains_is_left_out():
    model = network(6, 5, 5, 3)
    model[4].requires_grad_(False)
    assert train(model, lambda model: F.cross_entropy(model(X), Y)) == (["0"], {"2"})


def test_a_first_pass_in_an_evaluation_shows_the_layers_too():
    model = HeadFirst()
    controller = FreezeController(model, sgd(model), make_policy("none"), total_steps=4, say=None)
    with torch.no_grad():
        model.eval()(X[:1])
    assert [layer.name for layer in controller.layers] == ["body.0", "body.2"]


def averages(model):
    """Other tensors than the model's parameters, by their names."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def fast_weights(model):
    return {name: tensor.requires_grad_() for name, tensor in averages(model).items() if name.startswith("body")}


def other_parameters(model):
    return dict(copy.deepcopy(model).named_parameters())


@pytest.mark.parametrize("lent", [averages, fast_weights, other_parameters])
def test_a_call_with_tensors_in_place_of_the_parameters_shows_nothing(lent):
    model, said = HeadFirst(), []
    optimizers = sgd(model)
    policy = make_policy("static", share=1.0)
    controller = FreezeController(model, optimizers, policy, total_steps=4, say=said.append)
    torch.func.functional_call(model, lent(model), (X,))
    F.cross_entropy(model(X), Y).backward()
    optimizers[0].step()
    controller.step()
    assert [layer.name for layer in controller.layers] == ["body.0", "body.2"]
    assert not any(parameter.requires_grad for parameter in model.body.parameters())
    assert "a step takes" in said[0]
    assert "100% of a full" not in said[0]


@pytest.mark.filterwarnings("ignore:HeadFirst was not seen to run")
def test_where_all_calls_are_such_the_layers_are_as_defined():
    model, said = HeadFirst(), []
    optimizers = sgd(model)
    policy = make_policy("static", layers=1)
    controller = FreezeController(model, optimizers, policy, total_steps=4, say=said.append)

    def loss_of(weights):
        return F.cross_entropy(torch.func.functional_call(model, weights, (X,)), Y)

    gradients = torch.func.grad(loss_of)(dict(model.named_parameters()))
    for name, parameter in model.body.named_parameters():
        parameter.grad = gradients[f"body.{name}"]
    optimizers[0].step()
    controller.step()
    assert [layer.name for layer in controller.layers] == ["head", "body.0"]
    assert not model.head.weight.requires_grad
    assert said[1].startswith("FLOPs are not reported: the model does not hold its layers' parameters")


def test_a_head_that_was_put_in_after_the_controller_was_made_is_seen():
    model = HeadFirst()
    optimizers = sgd(model)
    controller = FreezeController(model, optimizers, make_policy("none"), total_steps=4, say=None)
    model.head = nn.Linear(5, 3)
    optimizers[0].add_param_group({"params": model.head.parameters()})
    model(X)
    assert [layer.name for layer in controller.layers] == ["body.0", "body.2"]


class Interrupted(nn.Module):
    """Defined from back to front, and interrupted in one of its passes."""

    def __init__(self):
        super().__init__()
        self.head, self.second, self.first = nn.Linear(5, 3), nn.Linear(5, 5), nn.Linear(6, 5)
        self.before = iter(())  # an iterator, since what a pass of ours takes from one is not brought back

    def forward(self, x):
        if next(self.before, None) == 0:
            raise KeyboardInterrupt
        return self.head(self.second(self.first(x)))


class WithParts(nn.Module):
    """Is interrupted in a part that the loop calls."""

    def __init__(self):
        super().__init__()
        self.head, self.coder = nn.Linear(3, 3), Interrupted()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("parts", [False, True])
def test_a_first_pass_that_was_interrupted_shows_the_layers_when_it_is_made_again(number, parts):
    model = WithParts() if parts else Interrupted()
    inner = model.coder if parts else model
    loss = (lambda: model.head(model.coder(X)).sum()) if parts else (lambda: model(X).sum())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    controller = FreezeController(model, optimizer, make_policy("static", share=1.0), total_steps=4, say=None)
    inner.before = iter(range(number, -1, -1))
    with pytest.raises(KeyboardInterrupt):
        loss()
    loss().backward()
    optimizer.step()
    controller.step()
    names = [layer.name for layer in controller.layers]
    assert names == (["coder.first", "coder.second", "coder.head"] if parts else ["first", "second"])


def test_afterwards_nothing_is_left_in_the_model():
    model = HeadFirst()
    optimizers = sgd(model)
    controller = FreezeController(model, optimizers, make_policy("none"), total_steps=4, say=None)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    controller.step()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_where_layers_are_as_defined_nothing_is_begun_anew():
    model, policy = network(6, 5, 5, 3), make_policy("static", share=0.5)
    controller = FreezeController(model, sgd(model), policy, total_steps=4, say=None)
    layers, history = controller.layers, list(controller.history)
    model(X)
    assert controller.layers is layers
    assert controller.history == history


def test_lines_and_history_are_those_of_the_layers_that_are_seen():
    said = []
    model = HeadFirst()
    optimizers = sgd(model)
    policy = make_policy("static", share=1.0)
    controller = FreezeController(model, optimizers, policy, total_steps=4, say=said.append)
    F.cross_entropy(model(X), Y).backward()
    optimizers[0].step()
    controller.step()
    assert [event.froze for event in controller.history] == [(0, 1)]
    assert len(said) == 1
    assert "body.0, body.2 (2 of 2 layers frozen): a step takes" in said[0]


def test_a_state_waits_for_the_layers_that_it_names():
    model = HeadFirst()
    optimizers = sgd(model)
    options = {"total_steps": 6, "say": None}
    policy = make_policy("linear", start=0.1, end=0.5)
    first = FreezeController(model, optimizers, policy, **options)
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
        optimizers[0].step()
        first.step()
    state = first.state_dict()
    del state["members"]  # one of before has names alone
    other = HeadFirst()
    again = FreezeController(other, sgd(other), make_policy("linear", start=0.1, end=0.5), **options)
    again.load_state_dict(state)
    assert again.state_dict() == state
    other(X)
    assert again.frozen == first.frozen != frozenset()
    assert again.history == first.history
    again.step()
    assert again.view.step == 4


def test_a_state_of_other_layers_is_refused():
    model = HeadFirst()
    controller = FreezeController(model, sgd(model), make_policy("none"), total_steps=6, say=None)
    with pytest.raises(UsageError, match="'stem' there"):
        controller.load_state_dict(controller.state_dict() | {"layers": ["stem"], "step": 2})
    controller.load_state_dict(controller.state_dict() | {"layers": ["body.2"], "step": 2})
    model(X)
    with pytest.raises(UsageError, match="1 layers, here are 2"):
        controller.step()


def test_a_state_with_the_layers_as_defined_goes_on_with_them():
    model = HeadFirst()
    controller = FreezeController(model, sgd(model), make_policy("none"), total_steps=6, say=None)
    names = [layer.name for layer in controller.layers]
    controller.load_state_dict(controller.state_dict() | {"step": 2})
    model(X)
    assert [layer.name for layer in controller.layers] == names


class Odd(HeadFirst):
    """Wants more samples than a pass of ours gives it."""

    def forward(self, x):
        if len(x) < 4:
            raise RuntimeError("too few")
        return super().forward(x)


def test_where_few_samples_do_not_do_all_are_taken():
    assert train(Odd(), lambda model: F.cross_entropy(model(X), Y))[0] == ["body.0", "body.2"]


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hooks_of_the_user_that_make_the_inputs_run_where_it_does_not_do_without(with_kwargs):
    def convert(module, args, kwargs=None):
        made = tuple(each.float() for each in args)
        return (made, kwargs) if with_kwargs else made[0]

    model = HeadFirst()
    model.register_forward_pre_hook(convert, with_kwargs=with_kwargs)
    images = (X * 100).to(torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(model, lambda model: F.cross_entropy(model(images), Y)) == (["body.0", "body.2"], {"head"})


class Once(HeadFirst):
    """Cannot be run twice."""

    def forward(self, batch):
        if not torch.is_grad_enabled():
            raise RuntimeError("no gradients")
        return super().forward(batch)


def test_where_the_model_cannot_be_run_a_warning_names_the_cure():
    with pytest.warns(UserWarning, match=r"Once could not be run.*head="):
        train(Once(), lambda model: F.cross_entropy(model(X), Y), policy=make_policy("none"))


class Hidden(nn.Module):
    """Its modules are used by their weights alone, so that no call is seen."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 3), nn.Linear(3, 3)


def test_where_no_call_is_seen_a_warning_names_the_cure():
    def loss_of(model):
        return F.cross_entropy(F.linear(F.linear(X, model.one.weight), model.two.weight), Y)

    with pytest.warns(UserWarning, match=r"'two'.*head="):
        train(Hidden(), loss_of, policy=make_policy("none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Hidden()
        layers = layers_of(model, head="one")
        FreezeController(model, sgd(model), make_policy("none"), total_steps=4, layers=layers, say=None).step()


def test_a_head_can_be_named():
    model = Distilled(False, held=False)
    assert "student.4" in [layer.name for layer in layers_of(model)]
    assert "student.4" not in [layer.name for layer in layers_of(model, head="student.4")]
    names = [layer.name for layer in layers_of(model, head=["student.4", "teacher*"])]
    assert names == ["student.0", "student.2"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("record", [torch.fx.symbolic_trace, lambda model: torch.jit.trace(model, X)])
def test_a_model_can_be_recorded_before_the_first_step_and_after_a_freeze(record):
    model = HeadFirst()
    optimizers = sgd(model)
    policy = make_policy("static", share=0.5)
    controller = FreezeController(model, optimizers, policy, total_steps=4, say=lambda line: None)
    for _ in range(3):
        assert torch.equal(record(model)(X.flip(0)), copy.deepcopy(model)(X.flip(0)))
        F.cross_entropy(model(X), Y).backward()
        optimizers[0].step()
        controller.step()
        optimizers[0].zero_grad()
    assert [layer.name for layer in controller.layers] == ["body.0", "body.2"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torch_script_names_the_cure():
    model = HeadFirst()
    controller = FreezeController(model, sgd(model), make_policy("none"), total_steps=4, say=None)
    with pytest.raises(AttributeError, match=r"before the controller is made, or after its close\(\)"):
        torch.jit.script(model)
    controller.close()
    assert torch.equal(torch.jit.script(model)(X), model(X))


@pytest.mark.parametrize("head", ["nothing.*", "student.1", []])
def test_a_head_that_names_nothing_is_refused(head):
    with pytest.raises(UsageError, match="head="):
        layers_of(Distilled(False), head=head)


def test_a_compiled_model_is_seen_before_it_is_compiled():
    model = HeadFirst()
    model.compile(backend="eager")
    layers, moved = train(model, lambda model: F.cross_entropy(model(X), Y))
    assert layers == ["body.0", "body.2"]
    assert moved == {"head"}
    model = HeadFirst()
    compiled = torch.compile(model, backend="eager")
    controller = FreezeController(compiled, sgd(model), make_policy("none"), total_steps=4, say=None)
    compiled(X)
    assert [layer.name for layer in controller.layers] == ["body.0", "body.2"]

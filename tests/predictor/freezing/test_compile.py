"""Compiled models: after each freeze they save what eager ones save, and after unfreezing, gradients come back."""

import sys
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from predictor import FreezeController
from predictor.freezing.compiled import CompiledCode
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Counting:
    """A compiler that runs the compiled graphs as they are, and counts their FLOPs and how often it compiled."""

    def __init__(self):
        self.flops = self.compiled = 0
        self.backend = aot_autograd(fw_compiler=self._compile, bw_compiler=self._compile)

    def _compile(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            bare = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                out = graph(*bare)
            self.flops += counter.get_total_flops()
            return out

        return make_boxed_func(run)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=2):  # that of PyTorch is 8
        yield
    torch.compiler.reset()


def train(net, called, answers, steps, measure, model=None):
    """What `measure` says of each step. model: what the controller is given, if it is not what is called."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    # silent: a line at a freeze takes a forward pass to count, which would be counted here
    model = called if model is None else model
    controller = FreezeController(model, optimizer, Script(answers), total_steps=steps, say=None)
    seen = []
    for _ in range(steps):
        seen.append(measure(lambda: F.cross_entropy(called(X), Y).backward()))
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    return seen


def eager_flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def make_toy_without_dropout(make_toy):
    net = make_toy()
    net.body[6].p = 0.0
    return net


def make_mlp(make_toy):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 3))


MANY = {1: {0}, 2: {1}, 3: {0, 1}, 4: {2}}
"""More frozen sets than those after which PyTorch, left alone, compiles no more and runs the model eagerly."""


@pytest.mark.parametrize(
    ("make", "answers"),
    [
        (make_toy_without_dropout, {0: {0, 1}, 2: {0, 1, 2}, 3: {0}, 4: ()}),
        (make_mlp, MANY),
    ],
)
def test_a_compiled_step_costs_what_an_eager_one_costs_after_each_change(make, answers, make_toy):
    counting, net, twin = Counting(), make(make_toy), make(make_toy)

    def compiled_flops(run):
        counting.flops = 0
        run()
        return counting.flops

    steps = max(answers) + 2
    compiled = train(net, torch.compile(net, backend=counting.backend), answers, steps, compiled_flops)
    assert compiled == train(twin, twin, answers, steps, eager_flops)
    assert len(set(compiled)) > 1
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


def test_nothing_is_compiled_anew_while_nothing_changes(make_toy):
    counting, net = Counting(), make_toy()
    called = torch.compile(net, backend=counting.backend)
    compiled = train(net, called, {2: {0}}, 6, lambda run: (run(), counting.compiled)[1])
    assert compiled == [2, 2, 4, 4, 4, 4]  # forward and backward, once for each of the two frozen sets


class Part(nn.Module):
    """A part of a model. PyTorch 2.6 compiles no nn.Sequential in index."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def test_a_module_compiled_in_place_keeps_up_too(make_toy):
    counting, net = Counting(), make_toy()
    net.body = Part(net.body)
    net.body.compile(backend=counting.backend)  # a part of the model, as `torch.compile` of regions does
    train(net, net, {1: {0}}, 3, lambda run: run())
    assert counting.compiled == 4


def test_layers_are_named_as_in_the_model_itself(make_toy):
    net = make_toy()
    called = torch.compile(net, backend="eager")
    controller = FreezeController(called, torch.optim.SGD(net.parameters(), 0.1), Script({}), total_steps=1)
    assert controller.model is net
    assert [layer.name for layer in controller.layers] == ["body.0", "body.3", "body.8"]


def test_a_resumed_training_compiles_for_what_is_frozen_there(make_toy):
    net = make_toy()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = FreezeController(net, optimizer, Script({0: {0, 1}}), total_steps=4).state_dict()
    counting, twin = Counting(), make_toy()
    called = torch.compile(twin, backend=counting.backend)
    F.cross_entropy(called(X), Y).backward()  # compiled before the state is loaded
    twin.zero_grad()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    controller = FreezeController(called, optimizer, Script({}), total_steps=4)
    controller.load_state_dict(state)
    F.cross_entropy(called(X), Y).backward()
    assert counting.compiled == 4
    assert [twin.body[index].weight.grad is None for index in (0, 3, 8)] == [True, True, False]


class Other(nn.Module):
    """Another model, with classes of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Torn(nn.Module):
    """A model that PyTorch compiles in two pieces."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = self.net.body(x)
        torch._dynamo.graph_break()
        return self.net.head(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's own, between pieces
def test_what_else_was_compiled_stays(make_toy):
    others, counting, net = Counting(), Counting(), make_toy()
    other = torch.compile(Other(), backend=others.backend)
    scaled = torch.compile(lambda loss: 0.5 * loss + loss**2, backend=others.backend)
    called = torch.compile(net, backend=counting.backend)

    def measure(run):
        run()
        scaled(other(X).sum()).backward()
        return others.compiled, counting.compiled

    seen = train(net, called, {2: {0}, 3: {0, 1}}, 5, measure)
    assert seen == [(4, 2), (4, 2), (4, 4), (4, 6), (4, 6)]


@pytest.mark.filterwarnings("ignore:ToyNet was not seen to run")  # its hooks are compiled with the step
def test_a_compiled_training_step_keeps_up(make_toy):
    counting, net, twin = Counting(), make_toy_without_dropout(make_toy), make_toy_without_dropout(make_toy)

    def flops(run):
        counting.flops = 0
        run()
        return counting.flops

    compiled = train(net, torch.compile(lambda x: net(x), backend=counting.backend), MANY, 6, flops, model=net)
    assert compiled == train(twin, twin, MANY, 6, eager_flops)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's own, between pieces
def test_a_model_compiled_in_pieces_keeps_up(make_toy):
    counting = Counting()
    net, twin = Torn(make_toy_without_dropout(make_toy)), make_toy_without_dropout(make_toy)

    def flops(run):
        counting.flops = 0
        run()
        return counting.flops

    compiled = train(net, torch.compile(net, backend=counting.backend), MANY, 6, flops)
    assert compiled == train(twin, twin, MANY, 6, eager_flops)


def test_a_compiled_model_is_not_compiled_at_every_step(make_toy):
    steps, answers = 60, {1: {0}, 2: {0, 1}, 3: {0, 1, 2}}  # the next change may come three steps after the first
    frozen = {}
    for compiled in (True, False):
        net = make_toy()
        called = torch.compile(net, backend="eager") if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        controller = FreezeController(called, optimizer, Script(answers), total_steps=steps, say=None)
        frozen[compiled] = []
        for _ in range(5):
            F.cross_entropy(called(X), Y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            frozen[compiled].append(len(controller.frozen))
    assert frozen == {True: [1, 1, 1, 3, 3], False: [1, 2, 3, 3, 3]}


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_changes_when_the_unbroken_one_does(stop, make_toy):
    answers = {1: {0}, 2: {0, 1}}  # the second change is kept back until three steps after the first

    def run(called, optimizer, controller, steps):
        frozen = []
        for _ in range(steps):
            F.cross_entropy(called(X), Y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
            frozen.append(controller.frozen)
        return frozen

    def made():
        net = make_toy()
        called = torch.compile(net, backend="eager")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return called, optimizer, FreezeController(called, optimizer, Script(answers), total_steps=60, say=None)

    unbroken, first, resumed = made(), made(), made()
    whole, before = run(*unbroken, 5), run(*first, stop)
    resumed[2].load_state_dict(first[2].state_dict())
    assert before + run(*resumed, 5 - stop) == whole
    assert resumed[2].history == unbroken[2].history


def test_captured_graphs_of_compiled_code_are_dropped_with_it(make_toy, monkeypatch):
    dropped = []
    trees = SimpleNamespace(
        local=SimpleNamespace(tree_manager_containers={0: "graphs"}),
        reset_cudagraph_trees=lambda: dropped.append("graphs"),
    )
    net = make_toy()
    code = CompiledCode(net, 100)
    torch.compile(net, backend="eager")(X)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)  # a stand-in: there is no GPU here
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append("code"))
    code.forget()
    assert dropped == ["code", "graphs"]


def test_private_parts_that_are_others_cost_a_full_reset(make_toy, monkeypatch):
    dropped = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append("code"))
    monkeypatch.delattr("torch._dynamo.convert_frame.input_codes")
    CompiledCode(make_toy(), 100).forget()
    assert dropped == ["code"]

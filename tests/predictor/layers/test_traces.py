"""A pass of ours leaves nothing behind: in parameters, objects, globals, caches, generators and inputs."""

import functools
import random
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from predictor import FreezeController, FreezePolicy, make_policy
from predictor.layers import contents
from predictor.layers.isolated_pass import isolated
from predictor.layers.tensors import copied, few_samples, tensors_anywhere_in

CALLS = 0
MEMO = {}


class Statistics:
    """A global object of the user's."""

    def __init__(self):
        self.passes = 0


STATISTICS = Statistics()


@functools.lru_cache
def mask(size):
    return torch.ones(size)


def memoized(function):
    kept, calls = {}, 0

    @functools.wraps(function)
    def inner(size):
        nonlocal calls
        calls += 1
        if size not in kept:
            kept[size] = function(size)
        return kept[size]

    inner.state = lambda: (len(kept), calls)
    return inner


@memoized
def positions(size):
    return torch.arange(size)


def counted(x):
    global CALLS
    CALLS += 1
    if "first" not in MEMO:
        MEMO["first"] = x
    return x


@dataclass
class Memory:
    """What a recurrent network may keep."""

    states: list


class Restless(nn.Module):
    """Keeps something in every way that Python has."""

    total = 0

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.key.requires_grad_(False)
        self.memory, self.queue = Memory([torch.zeros(2)]), deque(maxlen=3)
        self.drawn = torch.Generator(), np.random.default_rng(0), random.Random(1)
        self.register_buffer("keys", torch.zeros(4))
        self.register_buffer("broad", torch.zeros(3, 1).expand(3, 2))

    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(1)
        Restless.total += 1
        STATISTICS.passes += 1
        counted(x), mask(len(x)), positions(len(x))
        self.queue.append(x)
        self.memory.states[0].add_(1)
        self.memory.states.append(x)
        torch.rand(1, generator=self.drawn[0]), self.drawn[1].random(), self.drawn[2].random()
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
            self.key.bias.data = self.key.bias.data * 0.5
            self.keys.data.add_(1)
        return self.head(self.query(x) + self.key(x))

    def state(self):
        generators = self.drawn[0].get_state().tolist(), self.drawn[1].bit_generator.state, self.drawn[2].getstate()
        tensors = [p.tolist() for p in (*self.parameters(), *self.buffers(), *self.memory.states)]
        kept = CALLS, list(MEMO), STATISTICS.passes, self.total, mask.cache_info().currsize, positions.state()
        flags = [(p.requires_grad, p.data_ptr(), p.grad is None) for p in self.parameters()]
        return generators, tensors, kept, flags, len(self.queue), len(Restless.forward.__defaults__[0])


@pytest.mark.parametrize("as_in_training", [False, True])
def test_nothing_is_left_of_a_pass(as_in_training):
    model, x = Restless(), torch.ones(2, 4)
    before = model.state()
    with isolated(model, as_in_training=as_in_training):
        model(x)
        assert model.state() != before
    assert model.state() == before


def test_a_backward_pass_that_is_still_to_come_finds_its_tensors_unchanged():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    loss = model(torch.ones(2, 4)).sum()
    with isolated(model, as_in_training=True):
        model(torch.ones(2, 4))
    loss.backward()
    assert model[0].weight.grad is not None


@dataclass
class Graph:
    """Inputs as a library for graphs has them."""

    nodes: torch.Tensor
    extra: dict


def test_a_copy_has_nothing_in_common_with_objects_of_any_class():
    graph = Graph(torch.ones(2), {"edges": [torch.zeros(3)], "name": lambda: 1})
    graph.extra["itself"] = graph
    copy, same = copied((graph, graph.nodes))
    assert copy.nodes is same
    assert copy.nodes is not graph.nodes
    assert copy.extra["itself"] is copy
    copy.extra.pop("edges")[0].add_(1)
    assert [tensor.tolist() for tensor in tensors_anywhere_in(graph)] == [[1.0, 1.0], [0.0, 0.0, 0.0]]


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(TypeError):
        copied({"x": torch.ones(2), "lock": Lock()})


def test_a_copy_wants_no_gradients():
    assert not copied([torch.ones(2, requires_grad=True) * 2])[0].requires_grad


def test_a_transformers_batch_is_copied():
    batch = pytest.importorskip("transformers").BatchEncoding({"input_ids": torch.ones(2)})
    copied((batch,))[0].pop("input_ids")
    assert "input_ids" in batch


def test_few_samples_are_rows_or_items_of_lists():
    rows, other = few_samples((torch.ones(5, 3), {"y": torch.ones(5), "scale": torch.ones(3)}))
    assert rows.shape == (2, 3)
    assert [tensor.shape[0] for tensor in other.values()] == [2, 3]
    images, targets = few_samples(([torch.ones(3, 5)] * 4, [{"boxes": torch.ones(4, 4)}] * 4))
    assert len(images) == len(targets) == 2
    assert targets[0]["boxes"].shape == (4, 4)
    assert few_samples((torch.ones(1, 3), 2.0))[0].shape == (1, 3)


class Extractor:
    """Keeps a layer's outputs, as for distillation."""

    def __init__(self):
        self.outputs, self.last, self.calls = [], None, 0

    def keep(self, module, args, output):
        self.outputs.append(output)
        self.last = output
        self.calls += 1


def kept_in_a_closure(layer):
    outputs = []
    return outputs, layer.register_forward_hook(lambda module, args, output: outputs.append(output))


def kept_in_an_object(layer):
    extractor = Extractor()
    return extractor.outputs, layer.register_forward_hook(extractor.keep)


def kept_by_a_partial(layer):
    outputs = []
    return outputs, layer.register_forward_hook(functools.partial(lambda to, *given: to.append(given[-1]), outputs))


def kept_of_all_modules(layer):
    outputs = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: outputs.append(output) if module is layer else None
    )
    return outputs, hook


@pytest.mark.parametrize("keep", [kept_in_a_closure, kept_in_an_object, kept_by_a_partial, kept_of_all_modules])
def test_what_a_users_hook_keeps_is_of_the_trainings_passes(keep):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(
        model, optimizer, make_policy("static", layers=1), total_steps=9, layers=None, say=lambda line: None
    )
    outputs, handle = keep(model[2])
    with handle:
        for step in range(3):
            model(torch.randn(6, 4)).sum().backward()
            optimizer.step()
            controller.step()
            assert len(outputs) == step + 1
            assert outputs[-1].requires_grad


def test_a_count_in_an_object_of_a_hook_stays():
    extractor, model = Extractor(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[0].register_forward_hook(extractor.keep)
    with isolated(model):
        model(torch.randn(6, 4))
    assert (extractor.calls, extractor.last, extractor.outputs) == (0, None, [])


class Helper:
    """Draws, counts and runs a network that is no part of the model."""

    def __init__(self):
        self.drawn = np.random.RandomState(0), np.random.default_rng(0), np.random.PCG64(0)
        self.counts, self.calls, self.outputs = np.zeros(2), 0, []
        self.network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.network.averages = {"mean": torch.zeros(4)}

    def __call__(self, x):
        self.calls += 1
        self.counts += 1
        self.drawn[0].rand(), self.drawn[1].random(), self.drawn[2].random_raw()
        with torch.no_grad():
            self.outputs.append(self.network(x))
            self.network[0].weight.mul_(0.9)
            self.network.averages["mean"].add_(1)
        self.network.called = True
        return x + float(self.calls)

    def state(self):
        drawn = str(self.drawn[0].get_state()), str(self.drawn[1].bit_generator.state), str(self.drawn[2].state)
        tensors = [*self.network.state_dict().values(), *self.network.averages.values()]
        kept = self.calls, self.counts.tolist(), len(self.outputs), hasattr(self.network, "called")
        return drawn, [tensor.tolist() for tensor in tensors], kept, [part.training for part in self.network.modules()]


class Slotted:
    """Has no dictionary of attributes."""

    __slots__ = ("helper", "passes", "unset")

    def __init__(self, helper):
        self.helper, self.passes = helper, 0

    def __call__(self, x):
        self.passes += 1
        return self.helper(x) + self.passes

    def __eq__(self, other):
        return self.passes == other


class Registry(dict):
    """A container of the user's own."""


class Refusing(OrderedDict):
    """Takes nothing, as diffusers' configurations."""

    def __setitem__(self, name, value):
        raise TypeError("it is frozen")


class HelperOfAPackage(Helper):
    """Of a package that the model is not of."""


HelperOfAPackage.__module__ = "elsewhere.noise"
GLOBAL = []


def by_a_global_name(held, x):
    return GLOBAL[0](x)


def called(held, x):
    return held(x)


HELD = {
    "an attribute": (lambda helper: helper, called),
    "in a list": (lambda helper: [helper], lambda held, x: held[0](x)),
    "in a container of the user's": (lambda helper: Registry(noise=helper), lambda held, x: held["noise"](x)),
    "in a namespace": (lambda helper: SimpleNamespace(noise=helper), lambda held, x: held.noise(x)),
    "in slots": (Slotted, called),
    "a bound method": (lambda helper: helper.__call__, called),
    "a partial": (lambda helper: functools.partial(called, helper), called),
    "in a closure": (lambda helper: lambda x: helper(x), called),
    "a default": (lambda helper: lambda x, helper=helper: helper(x), called),
    "a global name": (lambda helper: GLOBAL.append(helper), by_a_global_name),
}


class Helped(nn.Module):
    """Has a helper."""

    def __init__(self, held, call):
        super().__init__()
        self.held, self.call = held, call
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.call(self.held, x)))


NAMED = ("in a closure", "a default", "a global name")
"""Not attributes. There only what is of the model's own package is looked into."""


@pytest.mark.parametrize("as_in_training", [False, True])
@pytest.mark.parametrize(
    ("held", "kind"),
    [(held, kind) for held in HELD for kind in (Helper, HelperOfAPackage) if kind is Helper or held not in NAMED],
)
def test_a_helper_of_the_models_is_afterwards_as_it_was(held, kind, as_in_training):
    GLOBAL.clear()
    helper = kind()
    hold, call = HELD[held]
    model = Helped(hold(helper), call)
    before = helper.state()
    with isolated(model, as_in_training=as_in_training):
        model(torch.randn(4, 4))
        assert helper.state() != before
    assert helper.state() == before
    assert not isinstance(model.held, Slotted) or model.held == 0


@pytest.mark.parametrize("held", NAMED)
def test_what_code_names_of_other_packages_is_left_alone_since_threads_may_use_it(held):
    GLOBAL.clear()
    helper = HelperOfAPackage()
    hold, call = HELD[held]
    model = Helped(hold(helper), call)
    with isolated(model):
        model(torch.randn(4, 4))
        after = helper.state()
    assert helper.state() == after


@pytest.mark.parametrize("method", ["keep", "pass_on"])
def test_what_a_hooks_object_keeps_by_another_method_is_taken_back(method):
    class Passing(Extractor):
        def pass_on(self, *given):
            self.keep(*given)

    extractor, model = Passing(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[0].register_forward_hook(getattr(extractor, method))
    with isolated(model):
        model(torch.randn(6, 4))
    assert (extractor.calls, extractor.last, extractor.outputs) == (0, None, [])


def test_hooks_that_a_network_beside_the_model_installs_are_taken_away():
    helper = Helper()
    model = Helped([helper.network], lambda held, x: held[0].register_forward_hook(called) and x)
    with isolated(model):
        model(torch.ones(2, 4))
    assert not helper.network._forward_hooks


def test_what_cannot_be_brought_back_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.random, model.gone = random.SystemRandom(), [weakref.proxy(Helper())]
    model.config = Refusing()
    OrderedDict.__setitem__(model.config, "size", 4)
    with isolated(model):
        model(torch.ones(2, 4))
        OrderedDict.__setitem__(model.config, "size", 5)
    assert dict(model.config) == {"size": 4}


class Boxes(torch.utils.data.Dataset):
    """Lists within lists, more than are searched, before what draws."""

    def __init__(self):
        self.boxes = [[[1.0] for _ in range(30)] for _ in range(800)]
        self.transforms = [[Statistics()], random.Random(0)]

    def __len__(self):
        return len(self.boxes)


@pytest.mark.parametrize("held", ["model", "loader"])
def test_long_lists_within_lists_keep_nothing_else_from_being_restored(held):
    data, model = Boxes(), nn.Linear(4, 2)
    loader = torch.utils.data.DataLoader(data)
    if held == "model":
        model.data = data
    inner, draws = data.transforms[0][0], data.transforms[1]
    before = draws.getstate()
    passes = STATISTICS.passes

    def hook(*_):
        STATISTICS.passes += 1
        inner.passes += 1
        draws.random()
        data.boxes[0].append([2.0])

    model.register_forward_hook(hook)
    with isolated(model, others=[loader] if held == "loader" else []):
        model(torch.ones(2, 4))
    assert draws.getstate() == before
    assert (inner.passes, STATISTICS.passes, len(data.boxes[0])) == (0, passes, 30)


def test_large_arrays_are_not_copied(monkeypatch):
    monkeypatch.setattr(contents, "_ARRAY_BYTES", 100)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.large, model.small = np.zeros(20), np.zeros(10)
    with isolated(model):
        model.large += 1
        model.small += 1
    assert (model.large.max(), model.small.max()) == (1, 0)


def test_what_the_users_own_policy_notes_lasts():
    class Noting(FreezePolicy):
        notes = ()

        def decide(self, view):
            return frozenset()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.policy = Noting()
    with isolated(model):
        model.policy.notes = ("seen",)
    assert model.policy.notes == ("seen",)

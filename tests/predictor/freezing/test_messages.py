"""What is said at a freeze: names, costs, and data loading where it has become the bottleneck."""

import copy
import itertools
import pickle
import time
from types import MappingProxyType

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, dataloader

from predictor import FeatureCache, FreezeController, FreezePolicy, make_policy
from predictor.freezing import data_wait
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def train(model, policy, steps=4, called=None, close=True, **options):
    lines = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = model if called is None else called
    controller = FreezeController(called, optimizer, policy, total_steps=steps, say=lines.append, **options)
    for _ in range(steps):
        F.cross_entropy(called(X), Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    if close:
        controller.close()
    return lines, controller


def test_a_line_names_what_changed_and_its_cost_before_and_after(make_toy):
    lines, controller = train(make_toy(), Script({1: {0}, 2: {0, 1, 2}, 3: {0, 1}}))
    shares = [controller.view.flops.share(frozenset(range(count))) for count in range(4)]
    say = "(%d of 3 layers frozen): a step takes %.0f%% of a full one's FLOPs, %.0f%% before"
    assert lines == [
        f"step 1: froze body.0 {say % (1, 100 * shares[1], 100)}",
        f"step 2: froze body.3, body.8 {say % (3, 100 * shares[3], 100 * shares[1])}; only the head still trains",
        f"step 3: unfroze body.8 {say % (2, 100 * shares[2], 100 * shares[3])}",
    ]
    assert 0 < shares[3] < shares[2] < shares[1] < 1


def test_the_end_is_reported_though_no_step_follows(make_toy):
    lines, controller = train(make_toy(), Script({1: {0}, 2: {0, 1, 2}}), steps=2, close=False)
    assert controller.finished
    assert lines[-1].endswith("before; only the head still trains")


def test_what_freezes_before_the_first_step_is_reported_after_it(make_toy):
    lines, _ = train(make_toy(), make_policy("static", layers=2), steps=1)
    assert len(lines) == 1
    assert lines[0].startswith("step 0: froze body.0, body.3 (2 of 3 layers frozen): a step takes ")


def test_what_freezes_at_the_last_step_is_reported_at_the_end(make_toy):
    lines, _ = train(make_toy(), Script({2: {0}}), steps=2)
    assert lines == ["step 2: froze body.0 (1 of 3 layers frozen)"]


def test_many_layers_are_not_all_named():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), *(torch.nn.Linear(64, 64) for _ in range(6)))
    lines, _ = train(model, make_policy("static", layers=5), steps=1)
    assert lines[0].startswith("step 0: froze 1 to 5 (5 layers) (5 of 5 layers frozen): ")


def test_nothing_is_counted_where_nothing_freezes_or_nobody_listens(make_toy):
    lines, controller = train(make_toy(), make_policy("none"))
    assert lines == []
    assert controller.view.flops is None
    model = make_toy()
    silent = FreezeController(model, torch.optim.SGD(model.parameters()), Script({0: {0}}), total_steps=1, say=None)
    model(X)
    silent.step()
    assert silent.view.flops is None


def test_a_policy_that_wants_flops_has_them_after_the_first_pass(make_toy):
    seen = []

    class Curious(FreezePolicy):
        wants_flops = True

        def decide(self, view):
            seen.append(view.flops is not None)
            return frozenset()

    train(make_toy(), Curious(), steps=2)
    assert seen == [False, True, True]


def test_reporting_changes_nothing_of_the_training(make_toy):
    weights = []
    for say in (print, None):
        model = make_toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = FreezeController(model, optimizer, Script({0: {0}, 2: {0, 1}}), total_steps=4, say=say)
        torch.manual_seed(1)
        for _ in range(4):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_costs_are_reported_beside_a_cache_and_under_compile(make_toy):
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lines = []
    controller = FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=3, say=lines.append)
    cache = FeatureCache(controller)
    for _ in range(3):
        with cache.batch(range(6)):
            loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert (cache.hits, cache.misses) == (2, 1)
    assert "FLOPs, 100% before" in lines[0]
    torch.compiler.reset()
    net = make_toy()
    told, _ = train(net, Script({1: {0}}), called=torch.compile(net, backend="eager"))
    assert "FLOPs, 100% before" in told[0]
    torch.compiler.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_while_it_is_watched(copied, make_toy):
    model = make_toy()
    FreezeController(model, torch.optim.SGD(model.parameters()), Script({0: {0}}), total_steps=3, say=print)
    twin = copied(model)
    assert torch.equal(twin.eval()(X), copy.deepcopy(model).eval()(X))


def test_a_saved_model_does_not_ask_for_the_library():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, Script({2: {0}}), total_steps=60, say=lambda line: None)
    for step in range(5):
        written = pickle.dumps(model)
        assert b"predictor" not in written, step
        loaded = pickle.loads(written)
        assert torch.equal(loaded(X[:, 0, 0]), model(X[:, 0, 0]))
        F.cross_entropy(model(X[:, 0, 0]), Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "written",
    [
        b"c__builtin__\ngetattr\n(cpredictor.layers.first_pass\n_Hook\n(tRVpre\ntR.",
        b"cpredictor.freezing.messages\n_Hook\n(cpredictor.freezing.messages\n_ignore\ntR.",
    ],
)
def test_a_model_that_an_earlier_version_saved_can_be_loaded(written):
    model = torch.nn.Linear(4, 3)
    model.register_forward_pre_hook(pickle.loads(written), with_kwargs=True)
    assert model(torch.ones(2, 4)).shape == (2, 3)
    assert b"predictor" not in pickle.dumps(copy.deepcopy(model))


def test_a_cache_goes_on_in_a_copy_of_a_watched_model(make_toy):
    model = make_toy()
    FreezeController(model, torch.optim.SGD(model.parameters()), Script({}), total_steps=3, say=print)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    policy = make_policy("static", layers=2)
    controller = FreezeController(twin, optimizer, policy, total_steps=3, say=None)
    cache = FeatureCache(controller)
    for _ in range(3):
        with cache.batch(range(6)):
            loss = F.cross_entropy(twin(X), Y)
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert (cache.hits, cache.misses) == (2, 1)


class Slow(torch.utils.data.Dataset):
    """Three samples, each of which takes some time to load."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        time.sleep(0.005)
        return X[index], Y[index]


def lines_of_loop(make_toy, batches, between=lambda step: None, freeze=MappingProxyType({1: {0}})):
    """What is said in a training over these batches, with something that runs after each step."""
    model, lines = make_toy(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, Script(freeze), total_steps=60, say=lines.append)
    for step, (x, y) in enumerate(batches):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        between(step)
    controller.close()
    return [line for line in lines if not line.startswith("step ")]


def slow_batches(count):
    loader = DataLoader(Slow(), batch_size=3)
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count)


def test_waiting_for_a_data_loader_is_reported_once_where_it_is_the_bottleneck(make_toy):
    lines = lines_of_loop(make_toy, slow_batches(48), freeze={1: {0}, 25: {0, 1}})
    assert len(lines) == 1
    assert lines[0].startswith("data loading has become the bottleneck: ")
    assert 50 < int(lines[0].removeprefix("data loading has become the bottleneck: ").split("%")[0]) <= 100


def test_nothing_is_said_of_data_that_is_there(make_toy):
    assert lines_of_loop(make_toy, [(X, Y)] * 30) == []


def test_what_runs_between_steps_is_not_taken_for_data_loading(make_toy):
    fast = DataLoader([(X[index], Y[index]) for index in range(6)], batch_size=6)
    batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(fast)), 30)
    (line,) = lines_of_loop(make_toy, batches, between=lambda step: time.sleep(0.02))
    assert not line.startswith("data loading")
    assert "outside the DataLoader" in line


def test_where_no_data_loader_is_seen_it_is_said_that_it_cannot_be_told(make_toy):
    def generated():
        for _ in range(30):
            time.sleep(0.02)
            yield X, Y

    (line,) = lines_of_loop(make_toy, generated())
    assert not line.startswith("data loading")
    assert "no torch DataLoader" in line


def test_a_long_gap_now_and_then_is_no_bottleneck(make_toy):
    def evaluates(step):
        if step % 6 == 0:
            time.sleep(0.1)

    assert lines_of_loop(make_toy, [(X, Y)] * 30, between=evaluates) == []


def test_data_loaders_are_timed_while_steps_are_measured_and_not_afterwards(make_toy):
    data_wait._listening.clear()  # trainings of other tests that ended while they were measured
    data_wait._listen()
    list(DataLoader([0]))
    before = dataloader._BaseDataLoaderIter.__next__
    during = []
    lines_of_loop(
        make_toy, [(X, Y)] * 30, between=lambda step: during.append(dataloader._BaseDataLoaderIter.__next__ is before)
    )
    assert during[0]
    assert not during[5]
    assert during[-1]
    assert dataloader._BaseDataLoaderIter.__next__ is before


class Uncountable(torch.nn.Module):
    """Refuses a pass beside the training's."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if not torch.is_grad_enabled():
            raise RuntimeError("no pass without gradients\nat all")
        return self.net(x)


@pytest.mark.filterwarnings("ignore:Uncountable could not be run to see")
def test_why_there_are_no_costs_is_said_once(make_toy):
    lines, _ = train(Uncountable(make_toy()), Script({1: {0}, 3: {0, 1}}), steps=6)
    assert [line for line in lines if not line.startswith("step ")] == [
        "FLOPs are not reported: RuntimeError: no pass without gradients"
    ]

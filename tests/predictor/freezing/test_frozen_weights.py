"""Frozen weights that move without a gradient, as under a replayed CUDA graph, are noticed. The user's writes stay."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from predictor.errors import UsageError
from predictor.freezing.frozen_weights import FrozenWeights
from predictor.freezing.wrappers import refuse_unfit
from tests.predictor.scripted import Script
from tests.second_device import second_device

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def replayed(parameter):
    """Writes as a replayed graph does: PyTorch does not count it."""
    parameter.data.add_(1)


def loaded(parameter):
    with torch.no_grad():
        parameter.copy_(parameter + 1.0)


def train(model, act, steps=12, calls=None):
    """Trains with the first layer frozen after the second step, and acts on its weight after each step behind that."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, Script({2: {0}}), total_steps=steps, say=None)
    if calls is not None:
        controller.on_moved(lambda: calls.append(controller.view.step))
    for step in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        if step > 3:
            act(model.body[0].weight)
    return controller


def test_a_graph_that_goes_on_training_frozen_weights_is_noticed_once_and_what_keeps_outputs_is_told(make_toy):
    calls = []
    with pytest.warns(UserWarning, match=r"CUDA graph .* controller.on_change") as told:
        train(make_toy(), replayed, calls=calls)
    assert len(told) == 1
    assert len(calls) > 1


@pytest.mark.parametrize("act", [lambda parameter: None, loaded])
def test_weights_that_stand_still_or_that_the_user_writes_to_are_not_reported(act, make_toy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_toy(), act)


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.ones(())),
        nn.Parameter(torch.ones(3, 2, 2).transpose(0, 2)),
        nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False),
    ],
)
def test_weights_of_any_kind_are_compared(parameter):
    watched = FrozenWeights()
    watched.keep([parameter, nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(2, device="meta"))])
    assert not watched.moved()
    replayed(parameter)
    assert watched.moved()
    assert not watched.moved()


def test_weights_that_are_no_numbers_stand_still_too():
    parameter = nn.Parameter(torch.full((2,), torch.nan))
    watched = FrozenWeights()
    watched.keep([parameter])
    assert not watched.moved()


def test_a_model_that_changes_its_type_has_not_moved():
    layer = nn.Linear(3, 3)
    watched = FrozenWeights()
    watched.keep(layer.parameters())
    layer.double()
    assert not watched.moved()


def noticed_on_second_device():
    """What two checks say after weights moved there, and how often the host waited for them."""
    with second_device() as counted:
        parameter = nn.Parameter(torch.ones(4).to("gpu"))
        watched = FrozenWeights()
        watched.keep([parameter])
        watched.moved()
        parameter.raw.add_(1.0)
        return [watched.moved(), watched.moved()], counted.count("predictor/")


def test_on_a_device_the_answer_comes_one_check_later_and_nothing_waits(on_second_device):
    assert on_second_device(noticed_on_second_device) == ([False, True], 0)


class make_graphed_callables:
    def new_fwd(self):
        """As PyTorch's replacement of a module's forward."""


def test_modules_that_were_made_graphs_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].forward = make_graphed_callables.new_fwd
    with pytest.raises(UsageError, match=r"Linear .*reduce-overhead"):
        refuse_unfit(net)


def test_a_step_within_a_capture_is_refused(make_toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match="after each replay"):
        train(make_toy(), lambda parameter: None)

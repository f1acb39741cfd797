"""BatchNorms that freeze before they have seen any data get the statistics of the first batches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from tests.predictor.scripted import LookingScript

DRAW = torch.Generator().manual_seed(0)
X, Y = 3 + 2 * torch.randn(64, 16, generator=DRAW), torch.arange(64) % 3


class Net(nn.Sequential):
    """Linear layers, each with a BatchNorm."""

    def __init__(self, norm=nn.BatchNorm1d):
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), norm(8), nn.Linear(8, 3))


def batches():
    return zip(X.split(8), Y.split(8), strict=True)


def looked(model, frozen=(0,), **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, LookingScript({0: frozen}), total_steps=20, say=None, **options)
    controller.look(batches(), lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    return controller


def state_of(norm):
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_what_freezes_gets_the_mean_over_the_parts_of_the_batches():
    model = Net()
    fresh = state_of(model[4])
    controller = looked(model)
    assert controller.frozen == {0}
    parts = [model[0](x[:4]) for x, _ in batches()]
    means = torch.stack([part.mean(dim=0) for part in parts])
    variances = torch.stack([part.var(dim=0) for part in parts])
    assert torch.allclose(model[1].running_mean, means.mean(dim=0), atol=1e-5)
    assert torch.allclose(model[1].running_var, variances.mean(dim=0), rtol=1e-4)
    assert int(model[1].num_batches_tracked) > 0
    assert (model[1].momentum, model[1].training) == (0.1, False)
    assert same(state_of(model[4]), fresh)  # trains on
    assert (model[4].momentum, model[4].training) == (0.1, True)


def test_the_gradients_are_those_of_normalised_batches():
    """As in the training, where a BatchNorm normalises by the batch."""
    look = looked(Net()).policy.looks[-1]
    model = Net().train()
    found = [torch.autograd.grad(F.cross_entropy(model(x[:4]), y[:4]), model[0].weight)[0] for x, y in batches()]
    weight = float(sum(found).abs().sum()) / len(found)
    assert weight < look.mean_l1_L[0] < 1.1 * weight + 1.0  # and the norm's and the biases


@pytest.mark.parametrize("frozen", [(), (0,)])
def test_statistics_that_are_known_stay(frozen):
    model = Net()
    model(X)  # in training
    before = [state_of(model[1]), state_of(model[4])]
    looked(model, frozen)
    assert same(state_of(model[1]), before[0])
    assert same(state_of(model[4]), before[1])


def test_what_the_user_has_switched_off_stays():
    model = Net()
    model[1].eval()
    before = state_of(model[1])
    looked(model)
    assert same(state_of(model[1]), before)


def test_a_model_that_is_still_in_evaluation_mode_is_measured_too():
    model = Net().eval()
    looked(model)
    assert int(model[1].num_batches_tracked) > 0
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{"dry_run": True}, {}])
def test_where_nothing_freezes_nothing_is_written(options):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    looked(model, (0, 1) if options else (), **options)
    assert same(before, model.state_dict())


def test_without_running_statistics_nothing_is_needed():
    model = Net(lambda width: nn.BatchNorm1d(width, track_running_stats=False))
    looked(model)
    assert not list(model.buffers())


def test_a_second_look_changes_nothing_more():
    model = Net()
    controller = looked(model)
    before = state_of(model[1])
    controller.look(batches(), lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert same(state_of(model[1]), before)


def test_a_layer_whose_statistics_cannot_be_measured_is_not_ready():
    """Those of several processes would have to be gathered."""
    assert looked(Net()).policy.looks[-1].ready == 2
    assert looked(Net(nn.SyncBatchNorm).eval()).policy.looks[-1].ready == 0


def test_on_the_meta_device_there_is_no_look_and_no_error():
    with torch.device("meta"):
        model = Net()
    assert looked(model, ()).policy.looks == []

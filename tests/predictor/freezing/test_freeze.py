"""What frozen means, one pitfall a test."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController, make_policy
from predictor.freezing.freeze import freeze, is_frozen, release, settle_containers, unfreeze
from predictor.layers.layer import layers_of

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def step(model, optimizer, **zero):
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad(**zero)


def everything(layer):
    tensors = list(layer.parameters()) + [buffer for module in layer.modules for buffer in module.buffers()]
    return [tensor.detach().clone() for tensor in tensors]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OPTIMIZERS = {
    "momentum and weight decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_layer_stands_still_to_the_bit(make_toy, make_optimizer, set_to_none):
    model = make_toy()
    optimizer = make_optimizer(model.parameters())
    step(model, optimizer)
    F.cross_entropy(model(X), Y).backward()  # left-over gradients
    layer = layers_of(model)[1]
    freeze(layer, [optimizer])
    before, active = everything(layer), model.head.weight.detach().clone()
    for _ in range(3):
        model.train()
        step(model, optimizer, set_to_none=set_to_none)
    assert same(before, everything(layer))
    assert not torch.equal(active, model.head.weight)


def test_without_freezing_the_same_steps_move_the_layer(make_toy):
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(layers_of(model)[1])
    step(model, optimizer)
    assert not same(before, everything(layers_of(model)[1]))


def test_evaluation_mode_outlasts_train(make_toy):
    model = make_toy()
    freeze(layers_of(model)[1])
    model.train()
    assert not model.body[4].training  # BatchNorm
    assert not model.body[6].training  # dropout
    assert model.body[1].training


def test_unfreezing_gives_gradients_and_training_mode_back(make_toy):
    model = make_toy()
    layer = layers_of(model)[1]
    freeze(layer)
    unfreeze([layer], model)
    assert model.body[4].training
    assert not is_frozen(layer)
    model.eval()
    assert not model.body[4].training
    F.cross_entropy(model(X), Y).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_optimizer_state_is_dropped_and_the_rest_still_saves_and_loads(make_toy):
    model = make_toy()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    layer = layers_of(model)[0]
    freeze(layer, [optimizer])
    assert not any(p in optimizer.state for p in layer.parameters())
    fresh = make_toy(seed=1)
    other = torch.optim.AdamW(fresh.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[fresh.head.weight]["exp_avg"], optimizer.state[model.head.weight]["exp_avg"])


def test_parameter_groups_stay_and_schedulers_go_on(make_toy):
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    freeze(layers_of(model)[0], [optimizer])
    for _ in range(4):
        step(model, optimizer)
        schedule.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_clipping_sees_no_stale_gradient(make_toy):
    model = make_toy()
    layer = layers_of(model)[0]
    F.cross_entropy(model(X), Y).backward()
    for parameter in layer.parameters():
        parameter.grad.fill_(1e6)
    freeze(layer)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) < 1e3


def test_a_copy_of_a_frozen_model_is_not_held(make_toy):
    model = make_toy()
    freeze(layers_of(model)[0], model=model)
    twin = copy.deepcopy(copy.deepcopy(model))
    twin.train()
    assert twin.body[1].training
    assert not model.train().body[1].training
    release(twin)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not model.body[0].weight.requires_grad


def test_a_frozen_model_pickles(make_toy, tmp_path):
    model = make_toy()
    freeze(layers_of(model)[0])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == make_toy().state_dict().keys()
    torch.save(nn.Sequential(*model.body), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    whole.train()
    assert whole[1].training
    assert not whole[0].weight.requires_grad
    release(whole)
    assert whole[0].weight.requires_grad
    assert torch.equal(whole[0].weight, model.body[0].weight)


def test_freezing_a_prefix_ends_the_backward_pass_there(make_toy):
    model = make_toy()
    for layer in layers_of(model)[:2]:
        freeze(layer)
    out = model.body[:6](X)
    assert not out.requires_grad
    F.cross_entropy(model(X), Y).backward()
    assert model.body[8].weight.grad is not None


class Attending(nn.Module):
    """A block with dropout of its own around two layers, as a BERT's attention is."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        scores = F.dropout(self.query(x), 0.5, self.training)
        return F.dropout(self.value(scores), 0.5, self.training)


def test_a_module_around_frozen_layers_alone_is_in_evaluation_mode_too():
    model = nn.Sequential(Attending(), Attending(), nn.Linear(8, 2)).train()
    layers = layers_of(model, torch.ones(3, 8))
    assert len(layers) == 4

    def modes():
        model.train()
        return [model.training, *(module.training for module in model)]

    for frozen, expected in [
        ({0}, [True, True, True, True]),
        ({0, 1, 2}, [True, False, True, True]),
        ({0, 1, 2, 3}, [True, False, False, True]),
        ({0, 2, 3}, [True, True, False, True]),
        (set(), [True, True, True, True]),
    ]:
        for index, layer in enumerate(layers):
            freeze(layer) if index in frozen else unfreeze([layer], model)
        settle_containers(model, layers, frozen)
        assert modes() == expected
        model.eval()
        settle_containers(model, layers, frozen)
        assert not any(module.training for module in model.modules())


def disabled_train(mode=True):
    """As many switch off a pretrained encoder's `train`, after its `eval`."""


def test_what_the_user_holds_in_evaluation_mode_stays_there_through_freezing_and_unfreezing():
    model = nn.Sequential(Attending(), Attending(), nn.Linear(8, 2)).train()
    layers = layers_of(model, torch.ones(3, 8))
    model[0].eval().train = disabled_train  # a container of two layers
    model[1].value.eval().train = disabled_train  # a layer by itself
    for frozen in (range(4), (), {0, 3}, {1}, ()):
        for index in frozen:
            freeze(layers[index])
        unfreeze([layer for index, layer in enumerate(layers) if index not in frozen], model)
        settle_containers(model, layers, frozen)
        model.train()
        held = [*model[0].modules(), model[1].value]
        assert not any(module.training for module in held)
        assert model[0].train is disabled_train
    assert model[1].value.train is disabled_train
    assert model[1].training
    assert model[1].query.training


def test_what_the_user_holds_in_training_mode_keeps_its_mode_around_frozen_layers():
    model = nn.Sequential(Attending(), nn.Linear(8, 2)).train()
    layers = layers_of(model, torch.ones(3, 8))
    model[0].train = disabled_train
    for layer in layers:
        freeze(layer)
    settle_containers(model, layers, {0, 1})
    assert model[0].training
    model.eval()
    unfreeze(layers, model)
    settle_containers(model, layers, ())
    assert model[0].training


def test_freezing_twice_keeps_the_users_train_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    model[1].train = disabled_train
    layer = layers_of(model)[0]
    freeze(layer)
    freeze(layer)
    twin = copy.deepcopy(model)
    unfreeze([layers_of(twin)[0]], twin)
    assert twin[1].train is disabled_train
    assert twin[1].training
    assert model[1].train is not disabled_train
    assert not model[1].training


def test_a_frozen_prefix_with_dropout_around_its_layers_gives_the_same_each_time():
    model = nn.Sequential(Attending(), Attending(), nn.Linear(8, 2)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = layers_of(model, torch.ones(3, 8))
    FreezeController(model, optimizer, make_policy("static", layers=2), total_steps=1, layers=layers)
    x = torch.randn(3, 8)
    assert torch.equal(model[0](x), model[0](x))
    assert not torch.equal(model[1](x), model[1](x))


def test_a_second_controller_of_the_model_leaves_what_the_first_one_froze():
    encoder = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), Attending())
    model = nn.Sequential(encoder, Attending(), Attending(), nn.Linear(8, 2)).train()
    layers = layers_of(model, torch.ones(3, 8))
    assert len(layers) == 7
    x = torch.randn(3, 8)
    controllers = []
    for own in (layers[:3], layers[3:]):
        optimizer = torch.optim.SGD([p for layer in own for p in layer.parameters()], lr=0.1)
        policy = make_policy("static", layers=3)
        controllers.append(FreezeController(model, optimizer, policy, total_steps=4, layers=own))
        model.train()
        statistics = encoder[0][1].running_mean.clone()
        assert torch.equal(encoder(x), encoder(x))
        assert torch.equal(encoder[0][1].running_mean, statistics)
    assert not model[1].training
    assert model[2].training
    controllers[1].release()
    assert all(module.training for module in model[1:].modules())
    assert not any(module.training for module in (*encoder[0][1:], encoder[1]))
    controllers[0].release()
    assert all(module.training for module in model.modules())

"""SmartFRZ before the first step: what it freezes by what it has learned that prefixes cost."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from predictor import FreezeController, make_policy
from predictor.model.file import load_predictor, save_predictor
from predictor.model.first_prefix import PrefixModel
from predictor.policies.smartfrz import SHIPPED

CHEAP = PrefixModel(-20.0, {"gradient": 1.0}, ((0.5, 1.0), (2.0, 4.0)))
"""Every prefix costs next to nothing."""
STEPS = 100
DEAR = replace(CHEAP, intercept=20.0)


def network(pretrained=True, norm=nn.Identity, first=None):
    torch.manual_seed(0)
    begin = nn.Linear(8, 16) if first is None else first
    model = nn.Sequential(begin, norm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    if pretrained:  # what training does to weights: a direction that is larger than others
        for layer in (model[0], model[3]):
            layer.weight.data += 0.5 * torch.randn(16, 1) @ torch.randn(1, layer.in_features)
    return model


def batches(count=10):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32, 8, generator=draw) for _ in range(count)]
    return [(x, x[:, :4].argmax(dim=1)) for x in inputs]


def started(tmp_path, learned, optimizer=torch.optim.SGD, look=True, model=None, **options):
    path = tmp_path / "p.safetensors"
    save_predictor(path, replace(load_predictor(SHIPPED), prefix=learned))
    model = network() if model is None else model
    policy = make_policy("smartfrz", predictor=path, **options)
    controller = FreezeController(model, optimizer(model.parameters(), lr=0.1), policy, total_steps=STEPS, say=None)
    assert not controller.frozen or "front" in options
    if look:
        controller.look(batches(), lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    return controller


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_prefix_that_costs_nothing_freezes_before_the_first_step(tmp_path, optimizer):
    controller = started(tmp_path, CHEAP, optimizer)
    assert controller.frozen == {0, 1}
    assert [(event.step, event.froze) for event in controller.history] == [(0, (0, 1))]
    assert controller.looked == 8 / 4


@pytest.mark.parametrize(
    ("learned", "options"),
    [
        (DEAR, {}),
        (CHEAP, {"front": 0.0}),  # the user's own
        (CHEAP, {"threshold": 0.9}),  # no risk to keep to
        (CHEAP, {"prefix": False}),
        (replace(CHEAP, allowances=()), {}),
        (None, {}),
    ],
)
def test_where_it_costs_too_much_or_is_not_asked_for_nothing_freezes(tmp_path, learned, options):
    assert started(tmp_path, learned, **options).frozen == frozenset()


RANDOM = replace(DEAR, scratch=replace(CHEAP, most_steps=STEPS))
"""Pretrained layers cost too much; random ones nothing, in trainings of so many steps."""


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_from_scratch_random_layers_freeze_by_a_model_of_their_own(tmp_path, norm):
    controller = started(tmp_path, RANDOM, model=network(False, norm))
    assert controller.frozen == {0, 1}
    assert controller.looked == 8 / 4
    if norm is nn.BatchNorm1d:
        assert int(controller.model[1].num_batches_tracked) > 0
    assert started(tmp_path, RANDOM, model=network(True, norm)).frozen == frozenset()


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return x @ self.rows


@pytest.mark.parametrize(
    ("learned", "model"),
    [
        (CHEAP, network(False, nn.LayerNorm)),  # a predictor that knows pretrained layers alone
        (RANDOM, network(False)),  # without a norm
        (RANDOM, network(False, nn.LayerNorm, first=Table())),  # which random numbers are no use for
        (replace(DEAR, scratch=replace(CHEAP, most_steps=STEPS - 1)), network(False, nn.LayerNorm)),
        (replace(DEAR, scratch=replace(CHEAP, fewest_steps=STEPS + 1)), network(False, nn.LayerNorm)),
    ],
)
def test_from_scratch_nothing_freezes_where_no_prefix_may(tmp_path, learned, model):
    controller = started(tmp_path, learned, model=model)
    assert controller.frozen == frozenset()
    assert controller.looked == 0  # nor is anything paid


def test_behind_a_new_first_layer_nothing_freezes(tmp_path):
    """The layers behind it have learned, and not the first."""
    model = nn.Sequential(network(True, nn.LayerNorm)[:-1], nn.Linear(16, 4))
    nn.init.normal_(model[0][0].weight)
    controller = started(tmp_path, replace(CHEAP, scratch=CHEAP), model=model)
    assert controller.frozen == frozenset()
    assert controller.looked == 0


def test_what_random_numbers_are_no_use_for_ends_the_prefix(tmp_path):
    model = network(False, nn.LayerNorm)
    nn.init.zeros_(model[3].weight)
    assert started(tmp_path, RANDOM, model=model).frozen == {0}


def test_in_a_short_training_it_does_not_look(tmp_path):
    """That would cost two steps."""
    assert started(tmp_path, replace(CHEAP, fewest_steps=STEPS)).frozen == {0, 1}
    controller = started(tmp_path, replace(CHEAP, fewest_steps=STEPS + 1))
    assert not controller.wants_look
    assert controller.frozen == frozenset()
    assert controller.looked == 0


def test_in_a_short_training_it_asks_the_model_of_those(tmp_path):
    short = replace(CHEAP, fewest_steps=2)
    assert started(tmp_path, replace(CHEAP, fewest_steps=STEPS + 1, shorter=short)).frozen == {0, 1}


def test_what_has_not_settled_stays_open(tmp_path):
    """The first of the two layers has some share of the gradient."""
    assert started(tmp_path, replace(CHEAP, most_early=2.0)).frozen == {0, 1}
    assert started(tmp_path, replace(CHEAP, most_early=0.01)).frozen == frozenset()


def test_it_knows_how_long_the_training_is(tmp_path):
    """A prefix may cost 1 pp, and costs 99 or 111 over the 100 steps, less the floor of 0.1."""
    for over, frozen in ((99.0, {0, 1}), (111.0, set())):
        assert started(tmp_path, replace(CHEAP, intercept=math.log(over), weights={"steps": -1.0})).frozen == frozen


def test_without_a_look_nothing_freezes(tmp_path):
    assert started(tmp_path, CHEAP, look=False).frozen == frozenset()


def test_a_higher_risk_freezes_more(tmp_path):
    grows = PrefixModel(0.0, {"gradient": 1.0}, ((0.5, 0.0), (2.0, 10.0)))
    assert started(tmp_path, grows).frozen == frozenset()
    assert started(tmp_path, grows, risk=2.0).frozen == {0, 1}


def test_a_file_of_an_earlier_version_chooses_by_what_it_has_learned_from(tmp_path):
    earlier = {"intercept": -20.0, "weights": {"share": 1.0, "agreement": -0.5}, "allowances": [[0.5, 1.0]]}
    assert started(tmp_path, PrefixModel.from_dict(earlier)).frozen == {0, 1}


def test_it_goes_on_behind_the_prefix_and_a_resumed_training_keeps_it(tmp_path):
    controller = started(tmp_path, CHEAP)
    optimizer = controller._optimizers[0]
    for x, y in batches():
        F.cross_entropy(controller.model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.frozen == {0, 1}
    other = started(tmp_path, DEAR, look=False)
    other.load_state_dict(controller.state_dict())
    assert other.frozen == {0, 1}
    other.look(batches(), lambda batch: F.cross_entropy(other.model(batch[0]), batch[1]))
    assert other.frozen == {0, 1}

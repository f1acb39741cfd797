"""SpFDE's schedule: worked out by hand, and what it costs against the target."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops, count_flops
from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View
from predictor.policies.spfde import block_ends, first_freeze

# Full step 3 * 60 - 10 (no gradient for the first layer's input) = 170. With the first two layers frozen: 60 forward,
# 40 for weights, 30 for inputs = 130; with four: 60 + 20 + 10 = 90; with all five that can: 60 + 10 = 70.
FIVE = LayerFlops((10,) * 5, (0,) * 5, (10,) * 5, 10)


def chain(length=5):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(length + 1)))


class Run:
    """The policy on a chain of five layers and a head."""

    def __init__(self, total_steps, lr=0.4, **options):
        self.model = chain()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.layers = layers_of(self.model)
        self.policy = make_policy("spfde", **options)
        self.policy.bind(self.model, self.optimizer, self.layers)
        self.total_steps = total_steps

    def view(self, step, flops=FIVE, frozen=()):
        return View(self.layers, frozenset(frozen), step, self.total_steps, flops)

    def frozen(self, step):
        return sorted(self.policy.decide(self.view(step)))


@pytest.mark.parametrize(
    ("layers", "blocks", "most", "ends"),
    [
        (12, 4, 2 / 3, (3, 6)),  # the third block's end, 9, is beyond 8
        (12, 6, 2 / 3, (2, 4, 6, 8)),
        (3, 8, 2 / 3, (1, 2)),  # a block a layer
        (5, 2, 1.0, (2, 5)),
        (5, 1, 0.5, ()),
    ],
)
def test_blocks_of_equally_many_layers(layers, blocks, most, ends):
    assert block_ends(layers, blocks, most) == ends


def test_the_first_freeze_worked_out_by_hand():
    # 40 FLOPs fewer in each step after T, 40 more after T + 10. Of 100 * 170 = 17000 a share of 0.8 leaves 3400 to
    # save: 40 (100 - T) + 40 (90 - T) = 3400, so T = 52.5, and 52 is the last step that saves enough.
    assert first_freeze(FIVE, (2, 4), (0, 10), 100, 0.8) == 52
    # A target so near that the second block never freezes: 40 (100 - T) = 170, T = 95.75.
    assert first_freeze(FIVE, (2, 4), (0, 10), 100, 0.99) == 95
    assert first_freeze(FIVE, (2, 4), (0, 10), 100, 1.0) == 100


def test_blocks_freeze_one_after_another_and_stay():
    run = Run(100, blocks=3, most=0.8, interval=0.1, target=0.8)  # blocks of 2, 1 and 2 layers; 3 may freeze
    # Three frozen layers: 60 + 30 + 20 = 110. 40 (100 - T) + 20 (90 - T) = 3400, T = 40.
    assert [run.frozen(step) for step in (0, 39, 40, 49, 50, 100)] == [[], [], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_without_flops_nothing_freezes_and_the_schedule_is_the_trainings():
    run = Run(100)
    views = [run.view(step, flops=None) for step in (0, 50, 100)]
    assert [run.policy.decide(view) for view in views] == [frozenset()] * 3
    assert [dict(run.policy.rates(view)) for view in views] == [{}] * 3


def test_each_blocks_rate_reaches_its_end_where_it_freezes():
    run = Run(100, blocks=3, most=0.8, interval=0.1, target=0.8)  # steps 40 and 50, as above
    group = run.optimizer.param_groups[0]
    assert run.policy.rates(run.view(0)) == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})
    group["lr"] = 0.1
    rates = run.policy.rates(run.view(20))  # halfway for the first block: half of 0.4, twice the scheduled 0.1
    assert rates == pytest.approx({0: 2.0, 1: 2.0, 2: 2.0 * (1 + torch.cos(torch.tensor(0.4 * torch.pi)).item())})
    assert run.policy.rates(run.view(40, frozen={0, 1}))[2] < 0.4
    assert set(run.policy.rates(run.view(40, frozen={0, 1}))) == {2}
    assert run.policy.rates(run.view(50)) == pytest.approx({0: 0, 1: 0, 2: 0})
    group["lr"] = 0.0
    assert run.policy.rates(run.view(20)) == {}


def test_a_block_whose_time_never_comes_follows_the_trainings_schedule():
    run = Run(100, blocks=5, most=0.8, interval=0.4, target=0.95)
    # One frozen layer: 60 + 50 + 40 = 150. 20 (100 - T) = 850, T = 57.5; the next block's step is 97, then 137.
    assert set(run.policy.rates(run.view(0))) == {0, 1}
    assert run.frozen(100) == [0, 1]


def test_a_target_out_of_reach_is_refused_with_what_is_left():
    # Four layers frozen after one step: 170 + 99 * 90 = 9080 of 17000 = 0.534.
    with pytest.raises(UsageError, match=r"target=0.5: .* up to 4 of 5 .* 0.534 of the FLOPs are left: raise"):
        first_freeze(FIVE, (4,), (0,), 100, 0.5)
    with pytest.raises(UsageError, match="up to 0 of 5"):
        first_freeze(FIVE, (), (), 100, 0.9)


@pytest.mark.parametrize("target", [0.7, 0.85, 0.95])
@pytest.mark.parametrize("interval", [0.0, 0.05, 0.1])
def test_a_trainings_flops_meet_the_target_within_a_step(target, interval):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = make_policy("spfde", blocks=9, interval=interval, target=target)
    steps, x = 60, torch.randn(4, 8)
    controller = FreezeController(model, optimizer, policy, total_steps=steps, say=None)
    flops = count_flops(model, controller.layers, (x,), {})
    spent = 0
    for _ in range(steps):
        spent += flops.step(controller.frozen)
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    full = flops.step(frozenset())
    assert target * steps * full - full < spent <= target * steps * full
    assert all(list(event.frozen) == list(range(len(event.frozen))) for event in controller.history)
    assert controller.history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks=0"),
        ({"interval": 1.5}, "interval=1.5"),
        ({"most": 0}, "most=0"),
        ({"target": 1.1}, "target=1.1"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_policy("spfde", **options)

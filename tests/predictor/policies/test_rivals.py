"""The rival methods' rules on cases worked out by hand."""

import itertools

import pytest
import torch
from torch import nn

from predictor.errors import UsageError
from predictor.layers.flops import LayerFlops
from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View
from predictor.policies.greentrainer import most_important
from predictor.policies.spectrum import signal_to_noise


class Run:
    """A policy on a chain of linear layers, whose gradients and weights the test sets itself."""

    def __init__(self, name, length, total_steps, lr=0.4, **options):
        self.model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(length + 1)))
        self.layers = layers_of(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.policy = make_policy(name, **options)
        self.total_steps, self.flops, self.number = total_steps, None, 0
        self.policy.bind(self.model, self.optimizer, self.layers)
        for layer in self.layers:
            nn.init.ones_(layer.own[0])
        self.frozen = frozenset()
        self.frozen = self.policy.decide(self.view)

    @property
    def view(self):
        return View(self.layers, self.frozen, self.number, self.total_steps, self.flops)

    @torch.no_grad()
    def step(self, gradients=None, moves=None):
        """Every weight of a layer gets this gradient, and is moved by so much; returns what is frozen then."""
        self.number += 1
        for index, layer in enumerate(self.layers):
            active = index not in self.frozen
            layer.own[0].grad = torch.full((2, 2), float(gradients[index])) if gradients and active else None
            layer.own[0].add_(moves[index] if moves and active else 0.0)
        self.policy.observe(self.view)
        if self.policy.due(self.number, self.total_steps):
            self.frozen = self.policy.decide(self.view)
        return sorted(self.frozen)


def test_freezeout_freezes_each_layer_when_its_time_is_over():
    # Linear: t_i = .5, .625, .75, .875 of 4 layers. Cubic from .8: .512, .614, .729, .857.
    run = Run("freezeout", 4, 8, schedule="linear", t0=0.5)
    assert [run.step() for _ in range(8)] == [[], [], [], [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    run = Run("freezeout", 4, 100)
    history = [run.step() for _ in range(100)]
    assert [next(step + 1 for step in range(100) if index in history[step]) for index in range(4)] == [52, 62, 73, 86]


def test_freezeouts_rates_replace_the_schedules():
    run = Run("freezeout", 4, 8, schedule="linear", t0=0.5, scaled=False)
    run.optimizer.param_groups[0]["lr"] = 0.2  # halfway down from 0.4
    assert run.policy.rates(run.view) == pytest.approx({0: 2, 1: 2, 2: 2, 3: 2})
    run.number = 2  # cos(pi .25 / .5) = 0, so half of 0.4
    assert run.policy.rates(run.view)[0] == pytest.approx(1.0)
    run.policy.scaled = True  # twice as fast for half as long
    assert run.policy.rates(run.view)[0] == pytest.approx(2.0)
    run.frozen = frozenset({0, 1})
    assert set(run.policy.rates(run.view)) == {2, 3}
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert run.policy.rates(run.view) == {}


def test_freezeout_knows_the_rate_from_which_the_training_began():
    def first(**options):
        return run.policy.rates(run.view)[0] * run.optimizer.param_groups[0]["lr"]

    run = Run("freezeout", 4, 8, scaled=False)
    group = run.optimizer.param_groups[0]
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.1)
    run.policy.bind(run.model, run.optimizer, run.layers)
    assert (group["lr"], first()) == pytest.approx((0.04, 0.4))
    state = run.policy.state_dict()
    run.optimizer.step()  # a schedule expects that first
    torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.7, total_steps=8)
    run.policy.bind(run.model, run.optimizer, run.layers)
    assert first() == pytest.approx(0.7)
    run.policy.load_state_dict(state)
    assert first() == pytest.approx(0.4)
    run = Run("freezeout", 4, 8, scaled=False, lr=0.4)
    run.policy.lr = 0.9
    run.policy.bind(run.model, run.optimizer, run.layers)
    assert first() == pytest.approx(0.9)


def test_freezeout_goes_by_the_parameter_group_that_holds_most_of_a_layer():
    run = Run("freezeout", 2, 8, scaled=False)
    weights = [parameter for parameter in run.model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in run.model.parameters() if parameter.dim() == 1]
    groups = torch.optim.SGD([{"params": biases, "lr": 0.1}, {"params": weights, "lr": 0.8}])
    run.policy.bind(run.model, groups, run.layers)
    groups.param_groups[1]["lr"] = 0.2
    assert run.policy.rates(run.view) == pytest.approx({0: 4.0, 1: 4.0})


def test_autofreeze_freezes_up_to_the_first_layer_that_still_changes():
    run = Run("autofreeze", 4, 6, intervals=3)
    # Signed sums: 3 - 2 = 1 for all layers in the first interval, with nothing yet to compare.
    assert [run.step([3.0] * 4), run.step([-2.0] * 4)] == [[], []]
    # Sums .9 .8 .5 .9, so changes .1 .2 .5 .1 with median .15: layer 1 is the first at or above it.
    assert [run.step([0.4, 0.4, 0.2, 0.4]), run.step([0.5, 0.4, 0.3, 0.5])] == [[], [0]]
    # Active layers: .8 -> .76, .5 -> .45, .9 -> .45, so changes .05 .1 .5 with median .1: layer 2 is the first.
    assert [run.step([0, 0.7, 0.4, 0.4]), run.step([0, 0.06, 0.05, 0.05])] == [[0], [0, 1]]


def test_autofreezes_percentile_sets_how_much_change_is_much():
    for percentile, expected in ((0, []), (100, [0, 1])):
        run = Run("autofreeze", 4, 2, intervals=2, percentile=percentile)
        run.step([1.0] * 4)
        assert run.step([0.9, 0.8, 0.5, 0.9]) == expected


def test_autofreeze_learns_nothing_from_an_interval_that_overflowed():
    run = Run("autofreeze", 2, 4, intervals=4)
    history = [run.step(g) for g in ([1.0, 1.0], [float("inf"), 1.0], [1.0, 2.0], [1.0, 4.0])]
    assert history == [[], [], [], [0]]


def test_pipetransformer_takes_a_third_of_what_is_left_each_epoch():
    # 9 (1 - (2/3)^T): 3, 5, 6.3, 7.2
    run = Run("pipetransformer", 9, 8, epochs=4)
    assert [len(run.step()) for _ in range(8)] == [0, 3, 3, 5, 5, 7, 7, 8]
    run = Run("pipetransformer", 3, 1, epochs=1)  # 3 (1 - 2/3) is 1, not a hair more
    assert run.step() == [0]


def test_pipetransformers_prefix_stops_before_the_smallest_gradient_when_adaptive():
    run = Run("pipetransformer", 9, 8, epochs=4, adaptive=True)
    low_in_1, low_in_8 = [3, 1, 3, 3, 3, 3, 3, 3, 2.9], [3] * 8 + [2]
    # Sums over an epoch's steps: the second step alone would say layer 8.
    assert [run.step(low_in_1), run.step([3, 2.5, 3, 3, 3, 3, 3, 3, 2.2])] == [[], [0]]
    assert [run.step(low_in_8), run.step(low_in_8)] == [[0], [0, 1, 2, 3, 4]]
    run.step(low_in_1)
    twin = Run("pipetransformer", 9, 8, epochs=4, adaptive=True)
    twin.policy.load_state_dict(run.policy.state_dict())
    twin.frozen, twin.number = run.frozen, run.number
    overflown = [3, 3, float("inf"), 3, 3, 3, 3, 3, 0]  # in one layer, so that the whole step was skipped
    assert run.step(overflown) == twin.step(overflown) == [0, 1, 2, 3, 4, 5, 6]


# Ten FLOPs a layer and for the head. With all frozen a step costs 50, and besides that, training {2} costs 20, {1} 30,
# {0} and {1, 2} 40, {0, 1} and {0, 2} 50, all three 60.
TEN_EACH = LayerFlops((10, 10, 10), (0, 0, 0), (10, 10, 10), 10)


@pytest.mark.parametrize(
    ("importance", "budget", "chosen"),
    [
        ((5, 3, 4), 40, {1, 2}),
        ((8, 3, 4), 40, {0}),
        ((8, 3, 4), 50, {0, 2}),
        ((8, 3, 4), 20, {2}),
        ((8, 3, 4), 19, set()),
        ((8, 3, 4), 60, {0, 1, 2}),
        ((8, -3, 4), 60, {0, 2}),
        ((-1, 0, -2), 60, set()),
    ],
)
def test_the_most_important_layers_within_a_budget(importance, budget, chosen):
    assert most_important(importance, TEN_EACH, (50 + budget + 1e-6) / 110) == chosen


def test_the_search_finds_what_trying_all_sets_finds():
    draw = torch.Generator().manual_seed(3)
    for share in torch.linspace(0.4, 0.98, 25).tolist():
        forward = torch.randint(5, 900, (8,), generator=draw).tolist()
        parts = [tuple(amount // part for amount in forward[:7]) for part in (1, 5, 3)]
        flops = LayerFlops(*parts, head=forward[7])
        importance = torch.randn(7, generator=draw).add(0.6).tolist()
        chosen = most_important(importance, flops, share)
        full, everything = flops.step(frozenset()), frozenset(range(7))
        sets = [frozenset(s) for size in range(8) for s in itertools.combinations(range(7), size)]
        allowed = share * full - 7 * full / 10_000  # what rounding may take
        best = max(sum(importance[p] for p in s) for s in sets if not s or flops.step(everything - s) <= allowed)
        assert not chosen or flops.step(everything - chosen) <= share * full
        assert sum(importance[index] for index in chosen) >= best - 1e-9


def test_greentrainer_measures_a_full_step_and_then_trains_the_choice():
    run = Run("greentrainer", 3, 8, rounds=2, share=(50 + 40.1) / 110)
    # -sum(g dw) over four weights: 4 (5, 3, 4). Without FLOPs there is no choice, and afterwards {1, 2} train.
    assert run.step([5, 3, 4], [-1, -1, -1]) == []
    run.flops = TEN_EACH
    assert run.step([5, 3, 4], [-1, -1, -1]) == [0]
    assert [run.step([1, 1, 1], [-1, -1, -1]), run.step([1, 1, 1], [-1, -1, -1])] == [[0], []]
    # A step that moves nothing, or overflows, is no measure. Then 4 (8, 3, 4).
    assert run.step([8, 3, 4], [0, 0, 0]) == []
    assert run.step([8, float("inf"), 4], [0, 0, 0]) == []
    assert run.step([4, 1, 1], [-2, -3, -4]) == [1, 2]
    assert run.step() == [1, 2]


def test_greentrainer_trains_all_layers_in_a_round_that_cannot_be_measured():
    run = Run("greentrainer", 3, 40, rounds=2, share=(50 + 40.1) / 110)
    run.flops = TEN_EACH
    history = [run.step([5, 3, 4], [step >= 12] * 3) for step in range(20)]
    assert history == [[]] * 20
    assert run.step([5, 3, 4], [-1, -1, -1]) == [0]


def test_slimfit_freezes_what_moves_least_and_lets_it_go_when_others_are_slower():
    run = Run("slimfit", 3, 8, share=1 / 3, every=2)
    assert [run.step(moves=[9, 9, 9]), run.step(moves=[3, 1, 2])] == [[], [1]]  # of weights of 10: .3 .1 .2
    # 13 -> 13.65 is .05, less than the .1 at which layer 1 stands; 12 -> 14.4 is .2
    assert [run.step(), run.step(moves=[0.65, 0, 2.4])] == [[1], [0]]


def test_slimfit_chooses_at_each_step_if_set_so_and_learns_nothing_from_a_step_that_was_skipped():
    run = Run("slimfit", 3, 4, share=1 / 3, every=1)
    assert run.step(moves=[0, 0, 0]) == []
    assert run.step(moves=[0.3, 0.1, 0.2]) == [1]
    assert run.step(moves=[0.065, 0, 0.3]) == [0]


def test_lisa_draws_a_few_layers_for_some_steps_each():
    run = Run("lisa", 6, 400, layers=2, every=4)
    random = torch.get_rng_state()
    periods = [run.frozen, *(frozenset(run.step()) for _ in range(399))]
    assert torch.equal(random, torch.get_rng_state())
    assert all(periods[step] == periods[step - step % 4] for step in range(400))
    assert all(len(frozen) == 3 and 0 not in frozen for frozen in periods)
    times = [sum(index not in frozen for frozen in periods[::4]) for index in range(1, 6)]
    assert sum(times) == 200
    assert min(times) > 20  # 40 each, give or take 5
    other = Run("lisa", 6, 400, layers=2, every=4, seed=1)
    assert [other.frozen, *(frozenset(other.step()) for _ in range(399))] != periods


def test_grades_freezes_what_changes_less_than_in_the_grace_period():
    run = Run("grades", 3, 10, share=0.5, grace=0.4)
    # Changes of each weight 2, 2, 2 and then 4, 2, 2: means 3, 2, 2, of which half is the threshold.
    assert [run.step(g) for g in ([0, 0, 0], [2, 2, 2], [6, 4, 4])] == [[], [], []]
    # Changes of 1.5, .9, 1: only layer 1 is below.
    assert run.step([7.5, 4.9, 5]) == [1]
    assert run.step([9.5, 0, 5.9]) == [1, 2]
    assert run.step([10.5, 0, 0]) == [0, 1, 2]


def test_grades_with_the_papers_threshold():
    run = Run("grades", 2, 10, tau=4 * 0.1, grace=0.3)
    assert [run.step(g) for g in ([1, 1], [1, 1.05], [1.2, 1.12])] == [[], [], [1]]
    # A step that a GradScaler skipped is no evidence, nor is the one after it.
    assert [run.step([float("inf"), 0]), run.step([1.2, 0]), run.step([1.25, 0])] == [[1], [1], [0, 1]]


def test_grades_freezes_a_layer_once_each_of_its_matrices_has_been_below():
    model = nn.Sequential(nn.Bilinear(2, 2, 2), nn.TransformerEncoderLayer(2, 1, 2), nn.Linear(2, 2))
    layers = layers_of(model[1:], granularity="block")
    policy = make_policy("grades", tau=0.5, grace=0.0)
    policy.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    own = [parameter for parameter in layers[0].parameters() if parameter.dim() > 1]
    assert len(own) > 1
    frozen = []
    for number, parts in enumerate(([0] * len(own), [0, *[9] * (len(own) - 1)], [9, *[9] * (len(own) - 1)]), 1):
        for parameter, value in zip(own, parts, strict=True):
            parameter.grad = torch.full_like(parameter, float(value))
        view = View(layers, frozenset(), number, 10)
        policy.observe(view)
        frozen.append(sorted(policy.decide(view)))
    # The first matrix was below in step 2, and the others, which have not changed since then, in step 3.
    assert frozen == [[], [], [0]]


def weight_of(*singular):
    """A square matrix with these singular values."""
    torch.manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(len(singular), len(singular)))
    return turned @ torch.diag(torch.tensor(singular)) @ turned.T


def test_signal_to_noise_by_hand():
    # Quartiles 2 and 4 of 1 2 3 4 9, so sigma 1.4826 and noise up to 2.965: 16 of signal over 3 of noise, over 9.
    assert signal_to_noise(weight_of(9.0, 4.0, 3.0, 2.0, 1.0)) == pytest.approx(16 / 3 / 9, rel=1e-4)
    assert signal_to_noise(torch.zeros(3, 2)) == 0.0
    assert signal_to_noise(torch.eye(2).view(2, 2, 1, 1)) == float("inf")  # nothing is below the edge of 0


def test_spectrum_trains_the_layers_with_most_signal():
    run = Run("spectrum", 4, 10, share=0.5)
    loud, quiet = weight_of(1.0, 0.9, 0.8, 0.7, 0.05), weight_of(1.0, 0.3, 0.2, 0.1, 0.05)
    with torch.no_grad():
        for layer, weight in zip(run.layers, (quiet, loud, quiet, loud), strict=True):
            layer.own[0].set_(weight.clone())
    assert signal_to_noise(loud) > signal_to_noise(quiet)
    assert run.policy.decide(run.view) == {0, 2}
    assert [step for step in range(10) if run.policy.due(step, 10)] == [0]


def test_spectrum_compares_matrices_of_one_type_and_leaves_embeddings_alone():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 2))
    layers = layers_of(model)
    policy = make_policy("spectrum", share=0.4)
    policy.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    # Two of one type: .4 of them is none.
    assert policy.decide(View(layers, frozenset(), 0, 10)) == {1, 2}
    policy.share = 0.5
    assert len(policy.decide(View(layers, frozenset(), 0, 10))) == 1


def test_auto_rgn_scales_rates_by_gradient_over_weight():
    run = Run("autorgn", 3, 20, rounds=2, batches=2)
    assert run.policy.rates(run.view) == {}
    with torch.no_grad():
        run.layers[1].own[0].fill_(2.0)
    # ||g|| / ||w|| of equal weights is g / w: means (1 + 3) / 2, (4 + 4) / 2 / 2 and (1 + 0) / 2.
    assert [run.step([1, 4, 1]), run.step([3, 4, 0])] == [[], []]
    assert run.policy.rates(run.view) == pytest.approx({0: 1.0, 1: 1.0, 2: 0.25})
    for _ in range(8):
        run.step([9, 9, 9])  # not measured
    assert run.policy.rates(run.view) == pytest.approx({0: 1.0, 1: 1.0, 2: 0.25})
    assert [run.step([1, 8, 2]), run.step([1, 8, 2])] == [[], []]
    assert run.policy.rates(run.view) == pytest.approx({0: 0.25, 1: 1.0, 2: 0.5})


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_auto_rgn_resumes_within_a_measurement_and_between_two(stop):
    draw = torch.Generator().manual_seed(0)
    gradients = torch.rand(16, 3, generator=draw).tolist()
    run, twin = (Run("autorgn", 3, 20, rounds=2, batches=2) for _ in range(2))
    for each in gradients[:stop]:
        run.step(each)
    twin.policy.load_state_dict(run.policy.state_dict())
    twin.number = run.number
    assert twin.policy.rates(twin.view) == run.policy.rates(run.view)
    for each in gradients[stop:]:
        run.step(each)
        twin.step(each)
        assert twin.policy.rates(twin.view) == run.policy.rates(run.view)
    assert twin.policy.rates(twin.view)


def test_auto_rgn_learns_nothing_from_steps_that_overflowed():
    run = Run("autorgn", 2, 20, rounds=2, batches=2)
    run.step([float("inf"), 1])
    run.step([1, 1])
    assert run.policy.rates(run.view) == {}


def test_auto_snr_freezes_layers_of_little_signal_until_the_next_round():
    run = Run("autorgn", 2, 12, criterion="snr", rounds=2, batches=1, threshold=0.95)
    weights = [layer.own[0] for layer in run.layers]

    def step(first, second):
        run.number += 1
        for weight, rows in zip(weights, (first, second), strict=True):
            weight.grad = torch.tensor([[row] * 2 for row in rows])
        run.policy.observe(run.view)
        if run.policy.due(run.number, 12):
            run.frozen = run.policy.decide(run.view)
        return sorted(run.frozen)

    # Rows 1 and -1: a variance of 2 and g^2 of 1, a signal of .5. Rows 3 and 1: 2, and 9 and 1, a signal of 2.5.
    assert step((1.0, -1.0), (3.0, 1.0)) == [0]
    assert [step((0.0, 0.0), (0.0, 0.0)) for _ in range(5)] == [[0], [0], [0], [0], []]
    assert step((3.0, 1.0), (1.0, -1.0)) == [1]


def test_random_grows_a_prefix_to_its_share():
    fronts = []
    for seed in (0, 0, 1):
        run = Run("random", 10, 200, share=0.6, seed=seed)
        fronts.append([run.step() for _ in range(200)])
    assert fronts[0] == fronts[1] != fronts[2]
    for front in fronts:
        assert front[-1] == [0, 1, 2, 3, 4, 5]
        assert all(
            now == list(range(len(now))) and len(now) >= len(before) for before, now in itertools.pairwise(front)
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("freezeout", {"schedule": "cube"}, "no FreezeOut schedule 'cube': did you mean 'cubic'"),
        ("freezeout", {"t0": 0}, "t0=0: give a progress"),
        ("freezeout", {"lr": 0.0}, "lr=0.0"),
        ("autofreeze", {"intervals": 1}, "intervals=1: give at least two"),
        ("autofreeze", {"percentile": 101}, "percentile=101"),
        ("pipetransformer", {"alpha": 1.0}, "alpha=1.0"),
        ("pipetransformer", {"epochs": 0}, "epochs=0"),
        ("greentrainer", {"share": 0}, "share=0: give a share of a full step"),
        ("greentrainer", {"rounds": 0}, "rounds=0"),
        ("slimfit", {"share": 1.1}, "share=1.1"),
        ("slimfit", {"every": 0}, "every=0"),
        ("lisa", {"layers": 0}, "layers=0"),
        ("lisa", {"every": 0}, "every=0"),
        ("grades", {"share": 0}, "share=0"),
        ("grades", {"tau": -1.0}, "tau=-1.0"),
        ("grades", {"grace": 1.0}, "grace=1.0"),
        ("grades", {"every": 0}, "every=0"),
        ("spectrum", {"share": 1.5}, "share=1.5"),
        ("autorgn", {"criterion": "rng"}, "did you mean 'rgn'"),
        ("autorgn", {"threshold": 0}, "threshold=0"),
        ("autorgn", {"rounds": 0}, "rounds=0"),
        ("autorgn", {"batches": 0}, "batches=0"),
        ("random", {"share": -1}, "share=-1"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_policy(name, **options)

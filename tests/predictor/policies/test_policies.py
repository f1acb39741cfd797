"""Each policy's rule on cases worked out by hand."""

import importlib
import sys

import pytest
import torch
from torch import nn

from predictor.errors import FileFault, UsageError
from predictor.layers.layer import layers_of
from predictor.model.features import recorded_signals
from predictor.model.file import load_predictor
from predictor.model.sampling import LayerSampler
from predictor.policies import POLICIES, make_policy
from predictor.policies.base import View
from predictor.policies.measuring.gradients import gradient_norms
from predictor.policies.smartfrz import SHIPPED


def chain(layers):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers + 1)))


def answers(policy, layers, total_steps, steps):
    indices = layers_of(chain(layers))
    return [sorted(policy.decide(View(indices, frozenset(), step, total_steps))) for step in steps]


def test_none_freezes_nothing():
    assert answers(make_policy("none"), 4, 10, [0, 5, 10]) == [[], [], []]


def test_shorter_freezes_nothing_and_asks_for_fewer_steps():
    policy = make_policy("shorter", budget=0.6)
    assert policy.budget == 0.6
    assert answers(policy, 4, 10, [0, 10]) == [[], []]
    assert make_policy("none").budget == make_policy("linear").budget == 1.0


def test_stopped_is_shorter_without_another_schedule():
    policy = make_policy("stopped", budget=0.6)
    assert (policy.budget, policy.rescaled) == (0.6, False)
    assert make_policy("shorter").rescaled
    assert answers(policy, 4, 10, [0, 10]) == [[], []]


def test_static_freezes_the_same_prefix_always():
    assert answers(make_policy("static", share=0.5), 4, 10, [0, 9]) == [[0, 1], [0, 1]]
    assert answers(make_policy("static", layers=3), 4, 10, [0]) == [[0, 1, 2]]


def test_static_leaves_the_last_layers_alone():
    assert answers(make_policy("static", last=1), 4, 10, [0, 9]) == [[0, 1, 2], [0, 1, 2]]
    assert answers(make_policy("static", last=4), 4, 10, [0]) == [[]]
    assert answers(make_policy("static"), 4, 10, [0]) == [[0, 1]]


def test_gradual_unfreezes_one_layer_after_another_from_the_back():
    # Four layers until .5: one more at each .125 of the training.
    expected = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2], [0, 1], [0], [0], [], []]
    assert answers(make_policy("gradual"), 4, 1000, [0, 124, 125, 250, 375, 499, 500, 1000]) == expected


def test_gradual_in_groups():
    # Five layers in two groups, until .4: three at .2, two at .4.
    assert answers(make_policy("gradual", until=0.4, groups=2), 5, 10, [0, 1, 2, 3, 4]) == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1],
        [0, 1],
        [],
    ]
    assert answers(make_policy("gradual", until=1, groups=9), 2, 10, [0, 5, 9, 10]) == [[0, 1], [0], [0], []]


def test_linear_grows_evenly_after_its_start():
    # share(t) = (t - 0.5) / 0.5, of 4 layers: .5 -> 0, .7 -> 1.6, .75 -> 2, .9 -> 3.2, 1 -> 4
    expected = [[], [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert answers(make_policy("linear"), 4, 100, [0, 50, 70, 75, 90, 100]) == expected
    assert answers(make_policy("linear", start=0.0, level=0.5), 4, 100, [0, 50, 100]) == [[], [0], [0, 1]]
    assert answers(make_policy("linear", end=0.9), 4, 100, [50, 61, 89, 90, 95]) == [
        [],
        [0],
        [0, 1, 2],
        *2 * [[*range(4)]],
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shorter", {"budget": 0}, "budget=0: give a share"),
        ("shorter", {"budget": 1.5}, "budget=1.5: give a share"),
        ("static", {"share": -0.1}, "share=-0.1"),
        ("static", {"layers": -1}, "layers=-1"),
        ("static", {"last": -1}, "last=-1"),
        ("static", {"share": 0.5, "last": 1}, "share=0.5, last=1: give one of them"),
        ("gradual", {"until": 0}, "until=0: give a progress"),
        ("gradual", {"groups": 0}, "groups=0: give a number"),
        ("linear", {"start": 1.0}, "start=1.0"),
        ("linear", {"level": 2}, "level=2"),
        ("linear", {"end": 0.5}, "end=0.5: give a progress after start=0.5"),
        ("linear", {"begin": 0.5}, "policy 'linear' cannot be made with"),
        ("liner", {}, "no policy 'liner': did you mean 'linear'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_policy(name, **options)


def test_static_beyond_the_model_is_refused():
    with pytest.raises(UsageError, match="layers=9: the model has 4 layers"):
        answers(make_policy("static", layers=9), 4, 10, [0])
    with pytest.raises(UsageError, match="last=9: the model has 4 layers"):
        answers(make_policy("static", last=9), 4, 10, [0])


@torch.no_grad()
def grow(parameters):
    for parameter in parameters:
        parameter.add_(0.01)


def run_smartfrz(path, steps, total_steps=12, **options):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = layers_of(model)
    policy = make_policy("smartfrz", predictor=path, **options)
    policy.bind(model, optimizer, layers)
    frozen = policy.decide(View(layers, frozenset(), 0, total_steps))
    history = [sorted(frozen)]
    for step in range(1, steps + 1):
        grow(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if policy.due(step, total_steps):
            frozen = policy.decide(View(layers, frozen, step, total_steps))
        history.append(sorted(frozen))
    return policy, history


def test_smartfrz_does_not_take_cleared_gradients_for_a_network_that_has_learnt_all():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    policy, layers = make_policy("smartfrz"), layers_of(model)
    policy.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    policy.decide(View(layers, frozenset(), 0, 60))
    model(torch.ones(2, 4)).sum().backward()
    policy.decide(View(layers, frozenset(), 1, 60))
    model.zero_grad()
    policy.decide(View(layers, frozenset(), 2, 60))
    with pytest.raises(UsageError, match=r"no layer has a gradient at step 3.* before optimizer.zero_grad\(\)"):
        policy.decide(View(layers, frozenset(), 3, 60))


def test_smartfrz_waits_for_a_whole_window_and_then_freezes_what_is_ready(make_predictor_file):
    # 12 snapshots over 24 steps: one every second step; the third (that of step 0 counts) is taken at step 4.
    _, history = run_smartfrz(make_predictor_file(probability=0.9, threshold=0.5), steps=5, total_steps=24)
    assert history == [[], [], [], [], [0, 1, 2], [0, 1, 2]]


def test_smartfrz_freezes_nothing_below_its_threshold(make_predictor_file):
    path = make_predictor_file(probability=0.9, threshold=0.95)
    assert run_smartfrz(path, steps=12)[1][-1] == []
    assert run_smartfrz(path, steps=12, threshold=0.8)[1][-1] == [0, 1, 2]


@pytest.mark.parametrize(("prefix", "expected"), [(True, {0}), (False, {0, 2})])
def test_smartfrz_keeps_a_prefix_unless_set_otherwise(make_predictor_file, prefix, expected):
    policy, _ = run_smartfrz(make_predictor_file(threshold=0.5), steps=1, prefix=prefix)
    view = View(layers_of(chain(3)), frozenset(), 1, 12)
    assert policy._choose(view, torch.tensor([0.9, 0.1, 0.9])) == expected
    view = View(layers_of(chain(4)), frozenset({0, 1}), 1, 12)
    assert policy._choose(view, torch.tensor([0.9, 0.1])) == {2}


def test_smartfrz_reads_the_windows_that_it_saw(make_predictor_file):
    policy, _ = run_smartfrz(make_predictor_file(probability=0.1), steps=5)
    seen = {}
    policy._model.forward = lambda windows, signals: seen.update(w=windows, s=signals) or torch.zeros(len(windows))
    grow(policy._optimizer.param_groups[0]["params"])
    model = chain(3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    policy.decide(View(layers_of(model), frozenset({0}), 6, 12))
    assert seen["w"].shape == (2, 3, 8)
    # Every weight grew by 0.01 a step, and each of the 12 steps has its snapshot.
    assert torch.allclose(seen["w"].diff(dim=1), torch.full((2, 2, 8), 0.01), atol=1e-6)
    assert torch.allclose(seen["s"][..., 0], torch.tensor([4 / 12, 5 / 12, 6 / 12]).expand(2, 3))
    assert seen["s"][:, 0, 1].tolist() == [0.5, 1.0]


def test_smartfrz_sees_while_training_what_was_recorded_for_learning(make_predictor_file):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    layers = layers_of(model)
    policy = make_policy("smartfrz", predictor=make_predictor_file(), threshold=1.0)
    policy.bind(model, optimizer, layers)
    sampler = LayerSampler(layers, policy._spec)
    policy.decide(View(layers, frozenset(), 0, 12))
    weights, gradients, rates = [sampler.sample_all()], [torch.full((2,), torch.nan)], [0.1]
    for step in range(1, 9):
        x = torch.randn(16, 4)
        nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        policy.decide(View(layers, frozenset(), step, 12))
        weights.append(sampler.sample_all())
        gradients.append(gradient_norms(layers))
        optimizer.zero_grad()
    recorded = recorded_signals(
        torch.stack(weights),
        torch.stack(gradients),
        torch.arange(9),
        torch.tensor(rates),
        torch.tensor([layer.size for layer in layers]),
        total_steps=12,
    )
    assert torch.allclose(torch.stack(list(policy._signals)), recorded[-3:], atol=1e-4)


def test_smartfrz_lets_a_frozen_layers_gradient_and_motion_fall_with_those_of_the_others(make_predictor_file):
    policy, _ = run_smartfrz(make_predictor_file(probability=0.1, risks=((0.5, 0.5),)), steps=5)
    layers = layers_of(chain(3))
    policy._move_L, policy._gradient_L = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    for layer in layers[1:]:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
    policy.decide(View(layers, frozenset({0}), 6, 12))
    assert policy._gradient_L[1] == policy._gradient_L[2] == pytest.approx(6**0.5)
    assert policy._gradient_L[0] == pytest.approx(4 * (12 / 61) ** 0.5)
    assert policy._move_L.tolist() == [0, 0, 0]  # the others stood still


def test_smartfrz_takes_a_risk_in_place_of_a_threshold(make_predictor_file):
    known = load_predictor(SHIPPED).risks
    assert make_policy("smartfrz").threshold == dict(known)[0.5]
    assert make_policy("smartfrz", risk=2.0).threshold == dict(known)[2.0] < dict(known)[0.5]
    with pytest.raises(UsageError, match=r"threshold=0.5, risk=1.0: give one of them"):
        make_policy("smartfrz", risk=1.0, threshold=0.5)
    with pytest.raises(UsageError, match=r"risk=50: give percentage points of accuracy from 0.1 to 2"):
        make_policy("smartfrz", risk=50)
    with pytest.raises(UsageError, match="does not know what freezing costs"):
        make_policy("smartfrz", predictor=make_predictor_file(), risk=0.5)


def test_smartfrz_waits_for_votes_in_a_row(make_predictor_file):
    policy, _ = run_smartfrz(make_predictor_file(threshold=0.5), steps=1, votes=2)
    view = View(layers_of(chain(3)), frozenset(), 1, 12)
    assert policy._choose(view, torch.tensor([0.9, 0.9, 0.9])) == set()
    resumed = make_policy("smartfrz", predictor=make_predictor_file(threshold=0.5), votes=2)
    resumed.load_state_dict(policy.state_dict())
    assert policy._choose(view, torch.tensor([0.9, 0.1, 0.9])) == {0}
    assert policy._choose(view, torch.tensor([0.9, 0.9, 0.9])) == {0}  # the second layer begins again
    assert resumed._choose(view, torch.tensor([0.9, 0.9, 0.1])) == {0, 1}


def test_smartfrz_freezes_a_prefix_before_the_first_step_where_it_is_set_to(make_predictor_file):
    path = make_predictor_file(probability=0.1, threshold=0.5)
    assert run_smartfrz(path, steps=1)[1] == [[], []]
    _, history = run_smartfrz(path, steps=5, total_steps=12, front=0.4)  # of three layers
    assert history == [[0]] * 6
    ready = make_predictor_file(probability=0.9, threshold=0.5)
    assert run_smartfrz(ready, steps=5, total_steps=24, front=0.7)[1] == [[0, 1]] * 4 + [[0, 1, 2]] * 2


def test_smartfrz_refuses_a_file_that_is_no_predictor_and_a_wrong_threshold(tmp_path, make_predictor_file):
    (tmp_path / "x.safetensors").write_bytes(b"not a predictor")
    with pytest.raises(FileFault, match=r"x\.safetensors"):
        make_policy("smartfrz", predictor=tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"threshold=1.2"):
        make_policy("smartfrz", predictor=make_predictor_file(), threshold=1.2)
    with pytest.raises(UsageError, match="votes=0: give a number"):
        make_policy("smartfrz", predictor=make_predictor_file(), votes=0)
    with pytest.raises(UsageError, match=r"front=1.5: give a share of the layers"):
        make_policy("smartfrz", predictor=make_predictor_file(), front=1.5)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_policies.py").write_text(
        "from predictor import FreezePolicy\n"
        "class First(FreezePolicy):\n"
        "    def __init__(self, count=1): self.count = count\n"
        "    def decide(self, view): return frozenset(range(self.count))\n"
        "class Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "own_policies"
    sys.modules.pop("own_policies", None)


def test_a_policy_of_the_users_own(own_module):
    assert answers(make_policy(f"{own_module}:First", count=2), 4, 10, [0]) == [[0, 1]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_policies:Frist", "policy 'own_policies:Frist': own_policies has no function or class Frist"),
        ("own_policies:Other", r"policy 'own_policies:Other' makes .*: derive it from predictor\.FreezePolicy"),
        ("no_such_module:First", "importing no_such_module fails"),
        ("own_policies:", "there is no policy 'own_policies:'"),
    ],
)
def test_a_policy_of_the_users_own_that_is_not_there(own_module, name, message):
    with pytest.raises(UsageError, match=message):
        make_policy(name)


def test_every_policy_has_a_card():
    for make in POLICIES.values():
        assert all(f"{part}:" in make.__doc__ for part in ("Paper", "Rule", "Signal", "Differs", "Cost")), make

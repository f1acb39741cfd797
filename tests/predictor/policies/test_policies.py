"""Each policy's rule on cases worked out by hand."""

import importlib

import pytest
from torch import nn

from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies import POLICIES, make_policy
from predictor.policies.base import View


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


def test_lengths_of_full_training_may_end_in_a_straight_line_to_zero():
    assert (make_policy("shorter").lr_schedule, make_policy("stopped").lr_cooldown) == (None, 0.0)
    assert make_policy("shorter", schedule="linear").lr_schedule == "linear"
    assert make_policy("stopped", cooldown=0.2).lr_cooldown == 0.2


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
        ("shorter", {"schedule": "linaer"}, "did you mean 'linear'"),
        ("stopped", {"cooldown": 1.1}, "cooldown=1.1: give a share"),
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
    return "own_policies"


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

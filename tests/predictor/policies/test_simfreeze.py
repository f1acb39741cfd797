"""SimFreeze's rule on similarities made by hand, and beside real trainings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from predictor import FreezeController
from predictor.errors import UsageError
from predictor.layers.layer import layers_of
from predictor.policies import make_policy
from predictor.policies.base import View


def turn(degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


def watched(**options):
    """Three layers of two features, and a first batch whose four samples are the corners of a long box."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(2))
    policy = make_policy("simfreeze", **options)
    layers = layers_of(model)
    policy.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    model(torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]]))
    return policy, model, layers


def run(policy, model, layers, changes):
    """The frozen layers after each step; `changes` says which layer's weight is set to what before the step's check."""
    frozen, history = frozenset(), []
    for step, change in enumerate(changes, start=1):
        with torch.no_grad():
            for index, weight in change.items():
                model[index].weight.copy_(weight)
        view = View(layers, frozen, step, len(changes))
        policy.observe(view)
        frozen = policy.decide(view)
        history.append(sorted(frozen))
    return history


STRETCH = torch.diag(torch.tensor([0.25, 1.0]))


def test_a_layer_freezes_after_so_many_checks_like_the_one_before():
    # The first check has none before it. Turning and scaling all alike is no change to CKA; stretching is.
    changes = [{}, {0: turn(40.0)}, {0: 3 * turn(70.0)}, {}]
    assert run(*watched(patience=2), changes) == [[], [], [0, 1, 2], [0, 1, 2]]
    # Layer 1 is stretched, and so are the outputs of those behind it: they start to count anew.
    changes = [{}, {}, {1: STRETCH}, {}, {}, {}]
    assert run(*watched(patience=3), changes) == [[], [], [], [0], [0], [0, 1, 2]]


def test_similarity_by_hand():
    """K and L of the box (2, 1) and of the stretched one (.5, 1) without diagonals, by pairs of corners.

    K: 3 for the long side, -3 and -5; L: -.75, .75 and -1.25. All rows sum to -5 and -1.25. tr(KL) = 4 (-2.25 - 2.25 +
    6.25) = 7; 1'K1 1'L1 / 6 = 20 * 5 / 6; 1'KL1 = 25. HSIC = (7 + 50/3 - 25) / 4 = -1/3.
    HSIC(K, K) = (172 + 400/6 - 100) / 4 = 34.667, HSIC(L, L) = (10.75 + 25/6 - 6.25) / 4 = 2.1667.
    """
    policy, model, layers = watched(patience=1, tolerance=0.999)
    similarity = -1 / 3 / (104 / 3 * 13 / 6) ** 0.5
    assert run(policy, model, layers, [{}, {0: STRETCH}]) == [[], []]
    for tolerance, frozen in ((1 - similarity + 1e-4, [0, 1, 2]), (1 - similarity - 1e-4, [])):
        policy, model, layers = watched(patience=1)
        policy.tolerance = tolerance
        assert run(policy, model, layers, [{}, {0: STRETCH}])[-1] == frozen


@pytest.mark.parametrize(("prefix", "expected"), [(True, []), (False, [1, 2])])
def test_a_prefix_is_kept_unless_set_otherwise(prefix, expected):
    # Layer 0 changes and layer 1 undoes it, so that only layer 0's own output changes.
    changes = [{}, {0: STRETCH, 1: STRETCH.inverse()}]
    assert run(*watched(patience=1, prefix=prefix), changes)[-1] == expected


def test_a_layer_whose_output_is_the_same_for_all_freezes_with_the_one_behind():
    policy, _, layers = watched(patience=1)
    policy._silent, policy._calm = [0, 2], {1: 1}
    assert sorted(policy.decide(View(layers, frozenset(), 5, 10))) == [0, 1]
    policy._calm = {}
    assert policy.decide(View(layers, frozenset(), 5, 10)) == frozenset()
    # All outputs are zero, which is like nothing: no layer freezes.
    assert run(*watched(patience=1), [{0: torch.zeros(2, 2)}, {}, {}])[-1] == []


def test_the_first_batch_is_kept_though_others_write_over_it():
    policy, model, layers = watched()
    x = torch.randn(6, 2)
    policy._taker.close(), policy._taker.wait()
    model(x)
    first = x.clone()
    policy.observe(View(layers, frozenset(), 1, 100))
    x.zero_()
    model(x)
    policy.observe(View(layers, frozenset(), 2, 100))
    assert torch.equal(policy._probe.args[0], first)
    assert not model._forward_pre_hooks
    policy.close()
    assert policy._probe is None


def test_batches_too_small_to_compare_and_options_that_cannot_work_are_refused():
    policy, model, layers = watched()
    policy._taker.close(), policy._taker.wait()
    model(torch.ones(3, 2))
    with pytest.raises(UsageError, match="first batch has 3 samples: simfreeze needs at least 4"):
        policy.observe(View(layers, frozenset(), 1, 10))
    for name, value in (("tolerance", 0), ("tolerance", 1.0), ("patience", 0), ("checks", 0)):
        with pytest.raises(UsageError, match=f"{name}={value}"):
            make_policy("simfreeze", **{name: value})


def test_as_long_as_it_freezes_nothing_the_training_is_what_it_was(make_toy):
    models = {"none": make_toy(), "simfreeze": make_toy()}
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        policy = make_policy(name, **({"tolerance": 1e-9} if name == "simfreeze" else {}))
        controller = FreezeController(model, optimizer, policy, total_steps=12)
        for step in range(12):
            torch.manual_seed(step)
            F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(3, (8,))).backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
        assert not controller.history
    assert set(policy._calm.values()) == {0}
    assert policy._calm.keys() == {0, 1, 2}
    states = zip(*(model.state_dict().values() for model in models.values()), strict=True)
    assert all(torch.equal(before, after) for before, after in states)

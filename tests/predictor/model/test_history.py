"""What the predictor sees: the same while training and in a replay, and nothing where nothing has moved."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from collect.hooks.recorder import Recorder
from collect.training.loop import Hook, train
from collect.training.optimizer import lr_share
from collect.workloads import WORKLOADS
from collect.workloads.recipe import Recipe
from predictor import FreezeController, FreezePolicy, make_policy
from predictor.model.config import FEATURES
from predictor.model.file import PredictorFile, load_predictor, save_predictor
from predictor.model.history import LayerHistory
from predictor.model.sampling import SampleSpec
from predictor.policies.smartfrz import SHIPPED
from predictor.training.dataset import Recording, replay

LR = FEATURES.index("log_lr")


def snapshots(count, layers=2, weights=8, seed=0):
    """weights_LK of a random walk."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, layers, weights, generator=draw).cumsum(0).unbind()


def filled(*moves, rates=None, window=3, total=20):
    """A history after snapshots at the steps 0, 1, ...; `moves` says which of them moved. And which it took."""
    made, walk, weights, taken = LayerHistory([10, 20], total, window), iter(snapshots(len(moves))), None, []
    for step, moved in enumerate(moves):
        weights = next(walk) if moved else weights
        taken.append(made.update(step, 0.1 if rates is None else rates[step], weights, torch.ones(2)))
    return made, taken


def test_a_snapshot_at_which_nothing_has_moved_is_left_out():
    made, taken = filled(1, 1, 0, 1, 0, 0, 1)
    assert taken == [True, True, False, True, False, False, True]
    assert made.length == 4
    assert [float(row[0, 0]) * 20 for row in made._features] == pytest.approx([1, 3, 6])  # of progress


def test_steps_at_which_nothing_moved_are_no_steps_between_snapshots():
    made, _ = filled(1, 0, 0, 0, 1)
    direct = LayerHistory([10, 20], 20, 3)
    first, second = snapshots(5)[:2]
    direct.update(3, 0.1, first, torch.ones(2))
    direct.update(4, 0.1, second, torch.ones(2))
    assert torch.equal(made._move_L, direct._move_L)


def test_what_is_frozen_does_not_count_as_moving_or_standing_still():
    made, (first, second, third) = LayerHistory([10, 20], 20, 3), snapshots(3)
    made.update(0, 0.1, first, torch.ones(2))
    assert not made.update(1, 0.1, torch.stack([second[0], first[1]]), torch.ones(2), frozen={0})
    assert made.update(2, 0.1, torch.stack([first[0], third[1]]), torch.ones(2), frozen={0})


def test_the_start_is_a_snapshot_even_at_a_rate_of_zero():
    made, taken = filled(1, 0, 0, 1, 1, rates=[0.0, 0.0, 0.0, 0.1, 0.2])
    assert taken == [True, False, False, True, True]
    assert made.ready
    assert [float(row[0, LR]) for row in made._features][1:] == [0, 0]  # each rate is the highest so far


def lengths_under(rates, total=None, window=3):
    """The length of the window at each snapshot, of which there is one a step."""
    history, walk = LayerHistory([10, 20], total or len(rates) - 1, window), snapshots(len(rates))
    lengths = []
    for step, (rate, weights) in enumerate(zip(rates, walk, strict=True)):
        history.update(step, rate, weights, torch.ones(2))
        lengths.append(history.length)
    return lengths


@pytest.mark.parametrize(
    ("rates", "lengths"),
    [
        ([1.0] * 6, [1, 2, 3, 4, 5, 6]),
        ([1.0, 0.8, 0.6, 0.4, 0.2, 0.01], [1, 2, 3, 4, 5, 6]),  # it falls steadily
        ([1.0, 1.0, 1.0, 0.1, 0.1, 0.1], [1, 2, 3, 1, 2, 3]),
        ([1.0, 1.0, 1.0, 0.4, 0.4, 0.4], [1, 2, 3, 4, 5, 6]),  # by less than to a third
        ([0.1, 0.4, 0.7, 1.0, 1.0, 0.9], [1, 2, 3, 4, 5, 6]),  # a warm-up is no rise to wait for
        ([1.0, 0.7, 0.9, 0.6, 0.9, 0.5], [1, 2, 3, 4, 5, 6]),  # nor is what goes up and down a little
        ([1.0, 0.1, 0.4, 0.7, 1.0, 0.9], [1, 2, 3, 4, 5, 6]),  # a warm-up in a loop that sets each step's rate itself
    ],
)
def test_where_the_rate_drops_the_window_begins_anew(rates, lengths):
    walk = torch.stack(snapshots(6))
    recording = Recording(torch.arange(6), torch.tensor(rates), walk, torch.ones(6, 2), torch.tensor([10, 20]), 5)
    assert replay(recording).length_T.tolist() == lengths_under(rates) == lengths


def cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def test_a_steep_fall_is_one_that_would_be_over_long_before_the_training():
    fall = [cosine(step / 20) for step in range(21)]
    assert lengths_under(fall, total=20)[-1] == 21
    early = lengths_under(fall, total=60)
    assert early[5] == 6
    assert set(early[8:]) == {1}


@pytest.mark.parametrize("cycles", [2, 3, 4, 6])
@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_no_window_ends_at_the_bottom_of_a_cycle_but_in_the_last(cycles, lowest):
    each = 60 // cycles
    rates = [lowest + (1 - lowest) * cosine(step % each / each) for step in range(60)]
    lengths = lengths_under(rates, total=60, window=10)
    predicted = [step for step in range(60) if lengths[step] >= 10 and rates[step] < 0.15]
    assert all(step >= 60 - each for step in predicted)
    assert predicted


@pytest.mark.parametrize("up", [2, 5, 10])
def test_no_window_ends_where_the_rate_is_low_and_rises_again(up):
    cycle = [*torch.linspace(0.02, 1, up).tolist(), *torch.linspace(1, 0.02, 10).tolist()]
    rates = (cycle * 60)[:60]
    lengths = lengths_under(rates, total=60, window=10)
    assert not [step for step in range(up + 10, 60) if lengths[step] >= 10 and rates[step] < 1 - step / 60]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "steps", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("steps", [30, 60, 1000])
def test_schedules_that_the_predictor_has_learned_from_begin_no_window_but_behind_a_drop(schedule, warmup, steps):
    recipe = Recipe(schedule=schedule, warmup=warmup)
    spec, history = SampleSpec(), LayerHistory([10, 20], steps, 10)
    taken = [step for step in range(steps + 1) if spec.due(step, steps)]
    begun = []
    for step, weights in zip(taken, snapshots(len(taken)), strict=True):
        history.update(step, lr_share(max(step - 1, 0), steps, recipe), weights, torch.ones(2))
        begun += [step] if history.length == 1 else []
    assert len(begun) == (3 if schedule == "steps" else 1)


def test_a_rate_for_each_layer_begins_the_window_of_that_layer():
    history, walk = LayerHistory([10, 20], 20, 3), snapshots(6)
    for step, weights in enumerate(walk):
        history.update(step, [0.1, 0.1 if step < 4 else 0.001], weights, torch.ones(2))
    assert history.length_L == [6, 2]
    assert history.with_window([0, 1]) == [0]
    assert history.features_LF[0, LR] == 0 > history.features_LF[1, LR]


def held(*still, window=3, gradients=(1.0, 1.0), **update):
    """A history of two layers, and its first layer's window after each snapshot: `still` says where it did not move."""
    history, walk, lengths = LayerHistory([10, 20], 20, window), snapshots(len(still)), []
    weights = walk[0]
    for step, (stands, now) in enumerate(zip(still, walk, strict=True)):
        weights = torch.stack([weights[0] if stands else now[0], now[1]])
        assert history.update(step, 0.1, weights, torch.tensor(gradients), **update)
        lengths.append(history.length_L[0])
    assert history.length_L[1] == len(still)
    return history, lengths


@pytest.mark.parametrize("norm", [math.nan, 0.0, 1.0])
def test_a_layer_that_stands_still_has_no_window_until_it_has_moved_for_one(norm):
    history, lengths = held(0, 0, 1, 0, 0, 0, gradients=(norm, 1.0))
    assert lengths == {"nan": [1, 1, 0, 1, 1, 1], "0.0": [0] * 6, "1.0": [1, 2, 0, 1, 2, 3]}[str(norm)]
    assert history.with_window([0, 1]) == ([0, 1] if norm == 1 else [1])


def test_a_layer_is_at_rest_when_nothing_has_trained_it_for_a_window():
    assert held(0, 0, 0, gradients=(0.0, 1.0))[0].at_rest([0, 1]) == {0}  # weight decay alone moves it
    assert held(0, 0, 1)[0].at_rest([0, 1]) == set()
    assert held(0, 1, 1)[0].at_rest([0, 1]) == {0}
    assert held(0, 1, 1)[0].at_rest([1]) == set()
    assert held(0, 1, 1, 0)[0].at_rest([0, 1]) == set()


def test_a_layer_that_the_user_holds_has_no_window_even_if_something_moves_it():
    history, lengths = held(0, 0, 0, 0, gradients=(math.nan, 1.0), resting={0})
    assert lengths == [0, 0, 0, 0]
    assert history.at_rest([0, 1]) == set()  # as the average of another network's weights, it is no part of a prefix


@pytest.mark.parametrize(("needed", "lengths"), [(True, [1, 1, 1, 2, 3]), (False, [1, 2, 3, 4, 5])])
def test_a_window_begins_right_before_the_first_gradient_if_gradients_are_needed(needed, lengths):
    made, found = LayerHistory([10], 20, 3, needs_gradients=needed), []
    for step, weights in enumerate(snapshots(5, layers=1)):
        made.update(step, 0.1, weights, torch.tensor([1.0 if step >= 3 else math.nan]))
        found.append(made.length)
    assert found == lengths


def test_what_the_user_holds_fades_with_the_others():
    made, walk = LayerHistory([10, 20], 20, 3, fade_frozen=True), snapshots(3)
    made.update(0, 0.1, walk[0], torch.tensor([math.nan, math.nan]))
    made.update(1, 0.1, walk[1], torch.tensor([4.0, 4.0]))
    made.update(2, 0.1, torch.stack([walk[1][0], walk[2][1]]), torch.tensor([math.nan, 2.0]))
    assert made._gradient_L.tolist() == [2.0, 2.0]


def test_a_layer_of_which_other_weights_are_sampled_begins_again_and_no_state_changes():
    made, _ = filled(1, 1, 1, 1)
    state, now = made.state_dict(), snapshots(5)[4]
    saved = [rows.clone() for rows in state["snapshots"]]
    made.restart([0], now, [5, 20])
    assert made.length_L == [0, 4]
    made.update(4, 0.1, now, torch.ones(2))
    assert made.length_L == [0, 5]
    assert all(torch.equal(*pair) for pair in zip(state["snapshots"], saved, strict=True))
    assert made.features_LF[0, FEATURES.index("log_distance")] < made.features_LF[1, FEATURES.index("log_distance")]


def test_a_layer_without_a_finite_gradient_keeps_its_own():
    made, walk = LayerHistory([10, 20], 20, 3), snapshots(4)
    gradients = ([math.nan, math.nan], [1.0, 2.0], [math.inf, 3.0], [4.0, math.nan])
    seen = []
    for step, (weights, gradient) in enumerate(zip(walk, gradients, strict=True)):
        made.update(step, 0.1, weights, torch.tensor(gradient))
        seen.append(made._gradient_L.tolist())
    assert seen == [[0, 0], [1, 2], [1, 3], [4, 3]]


@pytest.mark.parametrize(("fade", "expected"), [(True, [2.0, 2.0]), (False, [4.0, 2.0])])
def test_a_frozen_layer_fades_with_the_others_or_keeps_its_last(fade, expected):
    made, (first, second, third) = LayerHistory([10, 20], 20, 3, fade_frozen=fade), snapshots(3)
    made.update(0, 0.1, first, torch.tensor([math.nan, math.nan]))
    made.update(1, 0.1, second, torch.tensor([4.0, 4.0]))
    made.update(2, 0.1, third, torch.tensor([math.nan, 2.0]), frozen={0})
    assert made._gradient_L.tolist() == expected


def test_a_history_goes_on_from_its_state():
    one, _ = filled(1, 1, 1, 1)
    other = LayerHistory([10, 20], 20, 3)
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.update(4, 0.09, snapshots(1, seed=1)[0], torch.tensor([0.5, 0.25]))
    assert all(torch.equal(*pair) for pair in zip(one.windows([0, 1]), other.windows([0, 1]), strict=True))
    assert other.ready


def test_it_goes_on_from_a_state_of_the_version_before():
    one, _ = filled(1, 1, 1, 1)
    state = one.state_dict()
    former = {name: state[name] for name in ("snapshots", "signals", "first", "gradient", "move", "step")}
    other = LayerHistory([10, 20], 20, 3)
    other.load_state_dict({**former, "peak_lr": 0.1})
    for each in (one, other):
        each.update(4, 0.09, snapshots(1, seed=1)[0], torch.tensor([0.5, 0.25]))
    assert torch.equal(one.features_LF, other.features_LF)
    assert other.with_window([0, 1]) == [0, 1]


class Twice(FreezePolicy):
    """SmartFRZ looks on, while a plan freezes the first layer and then the second."""

    def __init__(self, smartfrz, plan):
        self.smartfrz, self.plan, self.seen = smartfrz, plan, {}

    def bind(self, model, optimizer, layers):
        self.smartfrz.bind(model, optimizer, layers)

    def due(self, step, total_steps):
        return self.smartfrz.due(step, total_steps)

    def decide(self, view):
        self.smartfrz.decide(view)
        history = self.smartfrz._history
        self.seen[view.step] = (history.features_LF, history._weights[-1], view.frozen)
        return frozenset(range(sum(view.step >= step for step in self.plan)))


class Watched(Hook):
    def __init__(self, policy):
        self.policy = policy

    def on_start(self, training):
        self.controller = FreezeController(
            training.model,
            training.optimizer,
            self.policy,
            total_steps=training.total_steps,
            layers=training.layers,
            say=None,
        )

    def on_step(self, training):
        self.controller.step()


@pytest.mark.parametrize("fade", [True, False])
def test_a_replay_of_the_recorded_run_gives_what_the_policy_saw_feature_by_feature(tmp_path, fade):
    """Parity: the recorder of `collect` and the policy in one training, in which layers freeze."""
    shipped = load_predictor(SHIPPED)
    path = tmp_path / "p.safetensors"
    save_predictor(path, PredictorFile(shipped.model, shipped.spec, 1.0, {}, shipped.risks if fade else ()))
    policy = Twice(make_policy("smartfrz", predictor=path, threshold=1.0), plan=(14, 25))
    recorder = Recorder(shipped.spec)
    workload = WORKLOADS["mlp-digits"]()
    workload = replace(workload, recipe=replace(workload.recipe, epochs=5.0, train_samples=500))
    # The recorder comes first: a layer that freezes after a step still had its gradient at that step.
    training = train(workload, seed=0, hooks=[recorder, Watched(policy)], device="cpu", scores="end")
    rows = recorder.fields()
    arrays = ("step_T", "lr_T", "weights_TLK", "gradient_norm_TL", "layer_sizes_L")
    recording = Recording(*(torch.from_numpy(rows[name]) for name in arrays), training.total_steps)

    replayed = replay(recording, fade_frozen=fade)
    assert replayed.kept == list(range(len(recording.step_T)))
    assert list(policy.seen) == recording.step_T.tolist()
    frozen_sets = {frozen for _, _, frozen in policy.seen.values()}
    assert frozen_sets == {frozenset(), frozenset({0}), frozenset({0, 1})}
    for row, (features_LF, weights_LK, _) in enumerate(policy.seen.values()):
        assert torch.equal(recording.weights_TLK[row], weights_LK)
        # Of frozen layers too: what they fade to, or keep.
        assert torch.equal(replayed.features_TLF[row], features_LF), row


@pytest.fixture
def eager(make_predictor_file):
    """A policy that freezes everything as soon as it has a window of four."""
    return make_policy("smartfrz", predictor=make_predictor_file(probability=0.9, window=4))


def loop(policy, steps, rate=lambda step: 0.1, skipped=(), total=12):
    """The steps at which something is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, policy, total_steps=total, say=None)
    frozen_at = []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate(step)
        model(torch.ones(2, 4)).square().sum().backward()
        if step in skipped:
            for parameter in model.parameters():
                parameter.grad.fill_(math.inf)  # a GradScaler does not call step() then
        else:
            optimizer.step()
        controller.step()
        optimizer.zero_grad()
        frozen_at += [step] if controller.frozen else []
    return frozen_at


def test_steps_that_a_scaler_skips_at_the_beginning_freeze_nothing(eager):
    assert loop(eager, 12, skipped=range(1, 8))[0] == 7 + 3


def test_a_warm_up_that_starts_at_a_rate_of_zero_freezes_nothing(eager):
    assert loop(eager, 12, rate=lambda step: max(step - 6, 0) / 60)[0] == 6 + 3


def test_a_whole_training_of_skipped_steps_freezes_nothing(eager):
    assert loop(eager, 12, skipped=range(1, 13)) == []


def test_nothing_is_left_out_of_a_plain_training(eager):
    assert loop(eager, 6)[0] == 3

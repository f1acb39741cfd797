"""The timeline of a training: shares by hand, a picture, and what a dry run says at its end."""

import sys

import pytest
import torch
from torch.nn import functional as F

from predictor import FreezeController, make_policy
from predictor.errors import UsageError
from predictor.freezing.event import FreezeEvent
from predictor.freezing.timeline import Timeline
from predictor.layers.flops import LayerFlops
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
NAMES = ("one", "two", "three")
FLOPS = LayerFlops(forward_L=(10, 10, 10), weightless_L=(0, 0, 0), entry_L=(10, 10, 10), head=10)


def event(step, before, after):
    before, after = frozenset(before), frozenset(after)
    return FreezeEvent(step, tuple(sorted(after - before)), tuple(sorted(before - after)), tuple(sorted(after)), 3)


EVENTS = (event(10, (), (0,)), event(20, (0,), (0, 1)), event(30, (0, 1), ()))


def test_shares_are_summed_over_the_steps_of_each_frozen_set():
    timeline = Timeline(NAMES, EVENTS, 40, 50, FLOPS)
    one, two = FLOPS.share(frozenset({0})), FLOPS.share(frozenset({0, 1}))
    assert two < one < 1
    assert timeline.saved_share == pytest.approx((10 * (1 - one) + 10 * (1 - two)) / 40)
    assert timeline.phases == [(0, 10, frozenset()), (10, 20, {0}), (20, 30, {0, 1}), (30, 40, frozenset())]
    assert timeline.figures() == {
        "freeze/frozen_layers": 0.0,
        "freeze/step_flops_share": 1.0,
        "freeze/saved_share": timeline.saved_share,
    }


def test_what_froze_before_the_first_step_saves_from_it_on():
    timeline = Timeline(NAMES, (event(0, (), (0, 1)),), 5, 50, FLOPS)
    assert timeline.saved_share == pytest.approx(1 - FLOPS.share(frozenset({0, 1})))
    assert Timeline(NAMES, (event(0, (), (0,)),), 0, 50, FLOPS).saved_share == 0.0


def test_without_flops_there_is_no_share():
    timeline = Timeline(NAMES, EVENTS, 40, 50, dry_run=True)
    assert timeline.figures() == {"freeze_dry_run/frozen_layers": 0.0}
    assert "not known" in " ".join(timeline.dry_run_summary())


def test_a_policy_that_changes_all_the_time_has_a_short_summary():
    events = tuple(event(step, (step % 2,), (1 - step % 2,)) for step in range(1, 500))
    assert len(Timeline(NAMES, events, 500, 500, FLOPS).dry_run_summary()) < 50


@pytest.mark.parametrize("flops", [FLOPS, None])
@pytest.mark.parametrize("events", [EVENTS, ()])
def test_it_is_drawn(tmp_path, events, flops):
    Timeline(NAMES, events, 40, 50, flops).plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    axes = Timeline(NAMES, events, 40, 50, flops).plot().axes
    frozen = [patch for patch in axes[0].patches if patch.get_width() == 10]
    assert len(frozen) == (3 if events else 0)


def test_what_was_saved_so_far_is_drawn_as_it_is_between_two_changes():
    _, axes = Timeline(NAMES, EVENTS, 40, 50, FLOPS).plot().axes
    steps, saved = axes.lines[0].get_data()
    drawn = dict(zip(steps, saved, strict=True))
    step = min(drawn, key=lambda step: abs(step - 15))
    spared = (step - 10) * (1 - FLOPS.share(frozenset({0})))
    assert drawn[step] == pytest.approx(spared / step)


def test_without_matplotlib_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        Timeline(NAMES, EVENTS, 40, 50).plot()


def trained(model, policy, steps=6, close=False, **options):
    lines = []
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, policy, total_steps=6, say=lines.append, **options)
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    if close:
        controller.close()
    return lines, controller


def test_the_controllers_timeline_is_drawn(make_toy, tmp_path):
    _, controller = trained(make_toy(), Script({2: {0}, 4: {0, 1}}))
    assert 0 < controller.timeline.saved_share < 1
    assert controller.timeline.frozen == {0, 1}
    controller.plot(tmp_path / "timeline.svg")
    assert "body.0" in (tmp_path / "timeline.svg").read_text()


@pytest.mark.parametrize(("steps", "close"), [(6, False), (6, True), (4, True)])
def test_a_dry_run_says_once_what_it_would_have_frozen(make_toy, steps, close):
    lines, controller = trained(make_toy(), Script({2: {0}, 3: {0, 1}}), steps, close, dry_run=True)
    _, real = trained(make_toy(), Script({2: {0}, 3: {0, 1}}), steps)
    assert controller.timeline.saved_share == pytest.approx(real.timeline.saved_share)
    summary = [line for line in lines if line.startswith("dry run of")]
    assert len(summary) == 1
    told = "\n".join(lines[lines.index(summary[0]) :])
    assert "step 2: freeze body.0" in told
    assert f"{controller.timeline.saved_share:.1%}" in told
    assert "accuracy is not known" in told


def test_a_dry_run_changes_no_number_though_it_counts(make_toy):
    nets = make_toy(), make_toy()
    trained(nets[0], Script({2: {0}}), dry_run=True)
    trained(nets[1], make_policy("none"))
    for ours, theirs in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_training_without_a_step_has_no_summary(make_toy):
    lines, _ = trained(make_toy(), Script({0: {0}}), steps=0, close=True, dry_run=True)
    assert not any(line.startswith("dry run of") for line in lines)


def test_a_real_training_has_no_summary(make_toy):
    lines, _ = trained(make_toy(), Script({2: {0}}), close=True)
    assert len(lines) == 1

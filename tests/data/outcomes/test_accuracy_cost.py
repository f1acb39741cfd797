"""The surface of accuracy cost: figures worked by hand, the shape that it must have, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset.windows import SHIPPED_SPLIT
from data.outcomes.accuracy_cost import accuracy_costs, cost_per_loss
from data.outcomes.records import Result, read_outcomes, write_outcomes
from predictor.errors import UsageError
from predictor.training.splits import HeldOut, read_held_out
from tests.data.made_outcomes import ended, made_outcome, made_run

UNFROZEN = Result("finished", 0.0, 0.5, 0.0)


def front(step, count, extra, **changes):
    """A front of a run of 100 steps, whose accuracy falls by 10 points for each unit of extra loss."""
    result = Result("diverged") if extra is None else Result("finished", extra, 0.5 - 0.1 * extra, extra)
    parts = {"total_steps": 100, "layer_count": 4, "result": result, "unfrozen": UNFROZEN, **changes}
    return made_outcome("front", step, tuple(range(count)), **parts)


def grid(extra_by_cell, **changes):
    return [front(step, count, extra, **changes) for (step, count), extra in extra_by_cell.items()]


def cost_of(extra_by_cell, **changes):
    (cost,) = accuracy_costs(grid(extra_by_cell, **changes)).values()
    return cost


IN_ORDER = {(0, 2): 0.4, (0, 4): 1.6, (50, 2): 0.1, (50, 4): 0.9}


def test_a_grid_in_order_stays_as_it_is():
    cost = cost_of(IN_ORDER)
    assert (cost.run_id, cost.total_steps, cost.layer_count) == ("mlp-0", 100, 4)
    assert cost.step_P.tolist() == [0, 50, 100]
    assert cost.prefix_F.tolist() == [0, 2, 4]
    assert cost.step_P.dtype == cost.prefix_F.dtype == np.int64
    np.testing.assert_allclose(cost.cost_PF, [[0, 4, 16], [0, 1, 9], [0, 0, 0]], atol=1e-12)
    # Roots at step 0 are 2 and 4 for fronts of 2 and 4, at step 50 they are 1 and 3: linear in between.
    expected_TL = np.square([[1, 2, 3, 4], [0.75, 1.5, 2.5, 3.5], [0.5, 1, 2, 3], [0.25, 0.5, 1, 1.5], [0, 0, 0, 0]])
    np.testing.assert_allclose(cost.cost([0, 25, 50, 75, 100]), expected_TL, atol=1e-12)


def test_outcomes_come_in_any_order():
    cost = cost_of(dict(reversed(IN_ORDER.items())))
    np.testing.assert_array_equal(cost.cost_PF, cost_of(IN_ORDER).cost_PF)


def test_a_grid_out_of_order_is_put_between_the_surfaces_above_and_below():
    # In pp: [[2, 1], [3, 5]]. Above: [[3, 5], [3, 5]]; below: [[1, 1], [1, 1]].
    cost = cost_of({(0, 2): 0.2, (0, 4): 0.1, (50, 2): 0.3, (50, 4): 0.5})
    np.testing.assert_allclose(cost.cost_PF[:2, 1:], [[2, 3], [2, 3]])
    # Only the small front's later moment is too high: [[2, 6], [4, 5]]. Above: [[4, 6], [4, 5]]; below: [[2, 6],
    # [2, 5]].
    cost = cost_of({(0, 2): 0.2, (0, 4): 0.6, (50, 2): 0.4, (50, 4): 0.5})
    np.testing.assert_allclose(cost.cost_PF[:2, 1:], [[3, 6], [3, 5]])


def test_what_helps_costs_nothing():
    cost = cost_of({(0, 2): -0.3, (0, 4): 1.6, (50, 2): -0.5, (50, 4): -0.1})
    np.testing.assert_allclose(cost.cost_PF, [[0, 0, 16], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("seed", range(5))
def test_any_grid_makes_a_surface_that_is_monotone_and_ends_at_zero(seed):
    generator = np.random.default_rng(seed)
    cells = {
        (step, count): generator.normal(0.3, 0.5)
        for step in (0, 10, 30, 75)
        for count in (1, 3, 4, 7)
        if (step, count) == (0, 1) or generator.random() < 0.8
    }
    # Another run, so that the sums are positive whatever the draw.
    outcomes = [*grid(cells, layer_count=9), front(0, 1, 30.0, run_id="mlp-1")]
    cost = accuracy_costs(outcomes)["mlp-0"]
    for points in (cost.cost_PF, cost.cost(np.arange(101))):
        assert np.isfinite(points).all()
        assert (points >= 0).all()
        assert (np.diff(points, axis=0) <= 1e-12).all()
        assert (np.diff(points, axis=1) >= -1e-12).all()
        assert points.max() > 0
        assert (points[-1] == 0).all()
    assert (cost.cost_PF[:, 0] == 0).all()
    on_grid = cost.cost(cost.step_P)[:, cost.prefix_F[1:] - 1]
    np.testing.assert_allclose(on_grid, cost.cost_PF[:, 1:], atol=1e-12)


def test_outside_the_known_it_is_what_it_is_at_the_edge():
    cost = cost_of({(20, 1): 0.1, (20, 2): 0.4})
    np.testing.assert_allclose(cost.cost([0, 20, 60]), [[1, 4, 4, 4], [1, 4, 4, 4], [0.25, 1, 1, 1]])


def test_a_single_front():
    cost = cost_of({(0, 4): 1.6})
    np.testing.assert_allclose(cost.cost([0, 50, 100]), [[1, 4, 9, 16], [0.25, 1, 2.25, 4], [0, 0, 0, 0]])


def test_flops_are_linear_between_the_fronts():
    fronts = [front(0, 1, 0.1, flops_share=0.8), front(50, 3, 0.1, flops_share=0.4)]
    (cost,) = accuracy_costs(fronts).values()
    np.testing.assert_array_equal(cost.flops_F, [1, 0.8, 0.4])
    np.testing.assert_allclose(cost.flops(), [1, 0.8, 0.6, 0.4, 0.4])


def test_a_missing_cell_is_what_its_neighbours_say():
    cells = {(0, count): extra for count, extra in ((1, 0.3), (2, 0.6), (3, 0.8), (4, 0.9))}
    # In pp at step 50: 2 at a front of 2; half of that at 1, and the same beyond.
    cost = cost_of({**cells, (50, 2): 0.2})
    np.testing.assert_allclose(cost.cost_PF[1], [0, 1, 2, 2, 2])
    cost = cost_of({**cells, (50, 1): 0.1, (50, 4): 0.7})
    np.testing.assert_allclose(cost.cost_PF[1], [0, 1, 3, 5, 7])


def test_a_front_that_diverged_loses_all_of_the_accuracy():
    cost = cost_of({(0, 2): 0.4, (0, 4): None, (50, 2): 0.1, (50, 4): 0.9})
    np.testing.assert_allclose(cost.cost_PF[:2, 1:], [[4, 50], [1, 9]])


def test_runs_that_diverged_and_runs_without_a_front_are_left_out():
    lost = Result("diverged")
    outcomes = [
        *grid(IN_ORDER),
        made_outcome("unfrozen", 0, (), run_id="lost", total_steps=100, layer_count=4, result=lost, unfrozen=lost),
        *made_run("none"),
        made_outcome("single", 10, (1,), run_id="none"),
    ]
    assert set(accuracy_costs(iter(outcomes))) == {"mlp-0"}
    assert cost_per_loss(iter(outcomes)) == pytest.approx(10)
    assert accuracy_costs([]) == {}
    assert accuracy_costs(made_run()) == {}


def test_what_accuracy_goes_with_loss_is_not_asked_of_runs_that_are_held_out():
    others = grid({(0, 2): 0.4, (50, 2): 0.1}, run_id="other", source="fashion-last")
    dearer = [replace(each, result=replace(each.result, final_accuracy=0.1)) for each in others]
    held_out = HeldOut(sources=("fashion",))
    costs = [accuracy_costs([*grid(IN_ORDER), *some], held_out) for some in (others, dearer)]
    np.testing.assert_array_equal(*(each["mlp-0"].cost_PF for each in costs))
    learnt_from = accuracy_costs([*grid(IN_ORDER), *dearer])
    assert (learnt_from["mlp-0"].cost_PF[0, 1:] > costs[0]["mlp-0"].cost_PF[0, 1:]).all()


def test_the_rate_is_a_ratio_of_sums_over_finished_fronts():
    outcomes = [
        made_outcome(result=Result("finished", 0.7, 0.85, 0.5)),
        made_outcome(step=20, result=Result("finished", 0.4, 0.84, 0.5)),
        made_outcome(step=30, result=ended(None)),
        made_outcome("single", 10, (1,), result=Result("finished", 9.0, 0.1, 9.0)),
    ]
    # 5 and 6 points for 0.2 and -0.1 of loss.
    assert cost_per_loss(outcomes) == pytest.approx(110)


def test_outcomes_that_were_written_and_read(tmp_path):
    runs = [*made_run(s10_1=0.52, s10_3=0.6, s20_1=0.53, s20_3=None), *made_run("mlp-1", s0_2=0.55)]
    write_outcomes(tmp_path / "o.jsonl", runs)
    costs = accuracy_costs(read_outcomes(tmp_path / "o.jsonl"))
    assert list(costs) == ["mlp-0", "mlp-1"]
    rate = 4 * 10 / 0.2  # four fronts that finished, each with 10 points less
    # In pp: [[4, 20], [6, 90]]. Above: [[6, 90], [6, 90]]; below: [[4, 20], [4, 20]].
    np.testing.assert_allclose(costs["mlp-0"].cost_PF, [[0, 5, 55], [0, 5, 55], [0, 0, 0]])
    np.testing.assert_allclose(costs["mlp-1"].cost_PF, [[0, 0.05 * rate], [0, 0]])
    assert costs["mlp-0"].step_P.tolist() == [10, 20, 40]
    assert costs["mlp-1"].cost([0, 40]).shape == (2, 3)


def test_a_rate_that_cannot_be_told_is_refused():
    helped = made_outcome(result=Result("finished", 0.4, 0.8, 0.4))
    with pytest.raises(UsageError, match=r"the 1 frozen prefixes that finished lose 10 pp of accuracy and gain -0.1"):
        cost_per_loss([helped])
    better = made_outcome(result=Result("finished", 0.6, 1.0, 0.4))
    with pytest.raises(UsageError, match=r"lose -10 pp of accuracy and gain 0.1 .*: gather outcomes of more runs"):
        accuracy_costs([better])
    with pytest.raises(UsageError, match=r"lose -10 pp of accuracy and gain -0\.1"):
        cost_per_loss([replace(better, result=Result("finished", 0.4, 1.0, 0.4))])
    for nothing in ([], [made_outcome(result=ended(None))]):
        with pytest.raises(UsageError, match="the 0 frozen prefixes that finished lose 0 pp"):
            cost_per_loss(nothing)


def test_outcomes_that_do_not_fit_together_are_refused():
    run = made_run(s10_2=0.7)
    with pytest.raises(UsageError, match="run mlp-0: total_steps is 40 in one outcome and 30 in another"):
        accuracy_costs([*run, made_outcome(step=20, total_steps=30)])
    with pytest.raises(UsageError, match="run mlp-0: layer_count is 3 in one outcome and 5 in another"):
        accuracy_costs([*run, made_outcome(step=20, layer_count=5)])
    with pytest.raises(UsageError, match="run mlp-0: its prefix of 2 layers at step 10 comes twice"):
        accuracy_costs([*run, made_outcome()])
    with pytest.raises(UsageError, match=r"run mlp-0: layers \(1, 2\) of kind 'front' are no prefix"):
        accuracy_costs([*run, made_outcome(layers=(1, 2))])


@pytest.mark.parametrize(("name", "runs"), [("shipped", 46), ("varied", 117)])
def test_the_published_outcomes_say_what_the_first_layer_does_alone(name, runs):
    packed = Path(__file__).parents[3] / "evaluate" / "results" / "outcomes" / f"{name}.jsonl.gz"
    costs = accuracy_costs(read_outcomes(packed), read_held_out(SHIPPED_SPLIT))
    assert len(costs) == runs
    assert all(
        cost.prefix_F[:2].tolist() == [0, 1] and cost.prefix_F[-1] == cost.layer_count for cost in costs.values()
    )
